"""What a text knows about itself, how several share a model, what one takes over from another, and drafts.

Beside them, how texts are asked for: requests in OpenAI's form, and chats, by a model's template.
"""
