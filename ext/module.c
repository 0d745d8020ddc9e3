/* The Python binding only: checks shapes, types, strides and sizes, lets go of Python's lock, calls
 * operations.c. Nothing that passes these checks can make a kernel read or write out of bounds. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "kernels.h"

/* ---- arrays ---- */

/* The formats of NumPy's types, as the buffer protocol spells them. */
static const char *const FLOAT32 = "f", *const FLOAT16 = "e", *const INT64 = "l", *const BYTES = "B";

static int fail(PyObject *kind, const char *format, ...) {
    va_list values;
    va_start(values, format);
    PyErr_FormatV(kind, format, values);
    va_end(values);
    return -1;
}

static Py_ssize_t count(const Py_buffer *view) { return view->itemsize ? view->len / view->itemsize : 0; }

static int is_contiguous(const Py_buffer *view) {
    Py_ssize_t expected = view->itemsize;
    if (!view->strides) return 1;
    for (int i = view->ndim - 1; i >= 0; i--) {
        if (view->shape[i] != 1 && view->strides[i] != expected) return 0;
        expected *= view->shape[i];
    }
    return 1;
}

static int same_format(const char *have, const char *want) {
    if (have && (*have == '<' || *have == '=' || *have == '@')) have++;
    if (want == INT64 && have && !strcmp(have, "q")) return 1;
    return have && !strcmp(have, want);
}

/* Formats alone don't tell: `l` has four bytes on some systems. */
static Py_ssize_t size_of(const char *format) {
    switch (*format) {
    case 'B': return 1;
    case 'e': case 'H': return 2;
    case 'f': return 4;
    default: return 8; /* l, Zf */
    }
}

/* Opens a C-contiguous, aligned array of a format and a number of dimensions (-1: any). */
static int open_array(PyObject *object, Py_buffer *view, const char *name, const char *format, int ndim,
                      int writable) {
    int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    view->obj = NULL;
    if (PyObject_GetBuffer(object, view, flags)) return -1;
    if (!same_format(view->format, format) || view->itemsize != size_of(format))
        fail(PyExc_TypeError, "%s must be an array of type '%s', not '%s' of %zd bytes", name, format,
             view->format ? view->format : "", view->itemsize);
    else if (ndim >= 0 && view->ndim != ndim)
        fail(PyExc_ValueError, "%s must have %d dimensions, not %d", name, ndim, view->ndim);
    else if (!is_contiguous(view))
        fail(PyExc_ValueError, "%s must be contiguous", name);
    else if ((uintptr_t)view->buf % (uintptr_t)view->itemsize)
        fail(PyExc_ValueError, "%s is not aligned", name);
    else
        return 0;
    PyBuffer_Release(view);
    view->obj = NULL;
    return -1;
}

/* Arrays of one call, which are closed together. */
typedef struct {
    Py_buffer views[40];
    int n;
} opened;

enum { MAX_WEIGHTS = 16 };

static Py_buffer *array(opened *all, PyObject *object, const char *name, const char *format, int ndim,
                        int writable) {
    Py_buffer *view = &all->views[all->n];
    if (open_array(object, view, name, format, ndim, writable)) return NULL;
    all->n++;
    return view;
}

static PyObject *finish(opened *all, int failed) {
    for (int i = 0; i < all->n; i++) PyBuffer_Release(&all->views[i]);
    if (failed) return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* result = call, with the pool locked and Python unlocked. */
#define WITHOUT_GIL(result, call)                                                                            \
    do {                                                                                                     \
        Py_BEGIN_ALLOW_THREADS;                                                                              \
        pool_lock();                                                                                         \
        result = (call);                                                                                     \
        pool_unlock();                                                                                       \
        Py_END_ALLOW_THREADS;                                                                                \
    } while (0)

static int same_shape(const Py_buffer *a, const Py_buffer *b) {
    for (int i = 0; a->ndim == b->ndim && i < a->ndim; i++)
        if (a->shape[i] != b->shape[i]) return 0;
    return a->ndim == b->ndim;
}

/* For "O&" of PyArg_ParseTuple. */
static int parse_threads(PyObject *object, void *threads) {
    long n = PyLong_AsLong(object);
    if (n < 1 && !PyErr_Occurred()) fail(PyExc_ValueError, "there is at least one thread, not %ld", n);
    *(int *)threads = n < MAX_THREADS ? (int)n : MAX_THREADS;
    return n >= 1;
}

/* ---- Weight ---- */

typedef struct {
    PyObject_HEAD
    weight w;
    Py_buffer memory;
    piece *pieces; /* of a mapped weight, and the arrays that they lie in */
    Py_buffer *arrays;
} WeightObject;

static PyTypeObject *weight_type_object;

static const char *const type_names[N_TYPES] = {
    [F32] = "f32", [F16] = "f16", [BF16] = "bf16", [Q4_0] = "q4_0",
    [Q4_1] = "q4_1", [Q5_0] = "q5_0", [Q5_1] = "q5_1", [Q8_0] = "q8_0",
};

static const char *const file_type_names[N_FILE_TYPES] = {
    [FILE_F32] = "f32",
    [FILE_F16] = "f16",
    [FILE_BF16] = "bf16",
    [FILE_Q4_0] = "q4_0",
    [FILE_Q4_1] = "q4_1",
    [FILE_Q5_0] = "q5_0",
    [FILE_Q5_1] = "q5_1",
    [FILE_Q8_0] = "q8_0",
    [FILE_Q6_K] = "q6_k",
    [FILE_Q4_0_2023] = "q4_0_2023",
    [FILE_Q4_0_2023_PLANAR] = "q4_0_2023_planar",
    [FILE_Q4_1_2023] = "q4_1_2023",
};

static int find_name(const char *name, const char *const *names, int n) {
    for (int i = 0; i < n; i++)
        if (!strcmp(name, names[i])) return i;
    return fail(PyExc_ValueError, "there is no type '%s'", name);
}

static int parse_layout(weight *w, const char *name, Py_ssize_t n_out, Py_ssize_t n_in) {
    int type = find_name(name, type_names, N_TYPES);
    if (type < 0) return -1;
    if (n_out < 1 || n_in < 1 || n_out > INT32_MAX || n_in > INT32_MAX)
        return fail(PyExc_ValueError, "no weight has the shape [%zd, %zd]", n_out, n_in);
    if (has_blocks(type) && n_in % BLOCK)
        return fail(PyExc_ValueError, "rows of blocks hold a multiple of %d weights, not %zd", BLOCK, n_in);
    if ((double)n_out * (double)n_in > 1e15) return fail(PyExc_ValueError, "no computer has the memory for it");
    weight_layout(w, type, n_out, n_in);
    return 0;
}

static PyObject *weight_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    const char *name;
    Py_ssize_t n_out, n_in;
    float factor;
    PyObject *memory;
    weight w;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Weight takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "snnfO", &name, &n_out, &n_in, &factor, &memory)) return NULL;
    if (parse_layout(&w, name, n_out, n_in)) return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    WeightObject *self = (WeightObject *)allocate(type, 0);
    if (!self) return NULL;
    if (memory == Py_None) {
        w.factor = factor;
        self->w = w;
        return (PyObject *)self;
    }
    if (open_array(memory, &self->memory, "memory", BYTES, 1, 1)) {
        Py_DECREF(self);
        return NULL;
    }
    if ((size_t)self->memory.len < weight_bytes(&w) || (uintptr_t)self->memory.buf % 64) {
        fail(PyExc_ValueError, "memory must begin on a cache line and have %zu bytes", weight_bytes(&w));
        Py_DECREF(self);
        return NULL;
    }
    w.factor = factor;
    w.data = self->memory.buf;
    self->w = w;
    return (PyObject *)self;
}

static void weight_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    WeightObject *self = (WeightObject *)object;
    if (self->memory.obj) PyBuffer_Release(&self->memory);
    for (long i = 0; i < self->w.n_pieces; i++) PyBuffer_Release(&self->arrays[i]);
    free(self->pieces);
    free(self->arrays);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *weight_shape(PyObject *object, void *closure) {
    (void)closure;
    const weight *w = &((WeightObject *)object)->w;
    return Py_BuildValue("ll", w->n_out, w->n_in);
}

static PyObject *weight_type_name(PyObject *object, void *closure) {
    (void)closure;
    return PyUnicode_FromString(type_names[((WeightObject *)object)->w.type]);
}

static PyObject *weight_nbytes(PyObject *object, void *closure) {
    (void)closure;
    const weight *w = &((WeightObject *)object)->w;
    return PyLong_FromSize_t(w->data ? weight_bytes(w) : 0);
}

static PyObject *weight_memory(PyObject *object, void *closure) {
    (void)closure;
    WeightObject *self = (WeightObject *)object;
    PyObject *list = PyList_New(0);
    if (list && self->w.data && PyList_Append(list, self->memory.obj)) Py_CLEAR(list);
    for (long i = 0; list && i < self->w.n_pieces; i++)
        if (PyList_Append(list, self->arrays[i].obj)) Py_CLEAR(list);
    return list;
}

static PyGetSetDef weight_attributes[] = {
    {"shape", weight_shape, NULL, "(n_out, n_in)", NULL},
    {"type", weight_type_name, NULL, "which kernels multiply by it", NULL},
    {"memory", weight_memory, NULL, "the arrays it lies in", NULL},
    {"nbytes", weight_nbytes, NULL, "memory it takes beside its file", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot weight_slots[] = {
    {Py_tp_new, weight_new},
    {Py_tp_dealloc, weight_dealloc},
    {Py_tp_getset, weight_attributes},
    {Py_tp_doc, "Weight(type, n_out, n_in, factor, memory): a prepared weight in writable memory, or, if that is "
                "None, in the file's blocks that are put into it."},
    {0, NULL},
};

static PyType_Spec weight_spec = {
    "tinyllama._native.Weight", sizeof(WeightObject), 0, Py_TPFLAGS_DEFAULT, weight_slots,
};

static const weight *as_weight(PyObject *object) {
    if (PyObject_TypeCheck(object, weight_type_object)) return &((WeightObject *)object)->w;
    PyErr_SetString(PyExc_TypeError, "expected a Weight");
    return NULL;
}

/* A weight with all its blocks. Those of a mapped one never overlap. */
static const weight *as_whole_weight(PyObject *object) {
    const weight *w = as_weight(object);
    long n = 0;
    if (!w || w->data) return w;
    for (const piece *p = w->pieces; p < w->pieces + w->n_pieces; p++) n += p->blocks.n_rows * p->blocks.n_cols;
    if (n == w->n_out * w->n_in) return w;
    PyErr_SetString(PyExc_ValueError, "some of the weight's blocks are missing");
    return NULL;
}

/* ---- functions ---- */

static PyObject *py_weight_bytes(PyObject *module, PyObject *args) {
    (void)module;
    const char *name;
    Py_ssize_t n_out, n_in;
    weight w;
    if (!PyArg_ParseTuple(args, "snn", &name, &n_out, &n_in) || parse_layout(&w, name, n_out, n_in)) return NULL;
    return PyLong_FromSize_t(weight_bytes(&w));
}

static int check_pack(const file_blocks *from, const weight *to, Py_ssize_t row, Py_ssize_t col,
                      Py_ssize_t size) {
    if (prepared_type(from->type) != to->type)
        return fail(PyExc_ValueError, "these blocks don't become a weight of this type");
    if (row < 0 || from->n_rows < 0 || from->n_rows > to->n_out || row > to->n_out - from->n_rows || col < 0 ||
        from->n_cols < 0 || from->n_cols > to->n_in || col > to->n_in - from->n_cols)
        return fail(PyExc_ValueError, "the blocks don't fit into the weight");
    if (has_blocks(to->type) && (col % BLOCK || from->n_cols % file_block(from->type)))
        return fail(PyExc_ValueError, "a block can't be cut");
    if (size != from->n_rows * file_row_bytes(from->type, from->n_cols))
        return fail(PyExc_ValueError, "%zd bytes are not the size of the blocks", size);
    return 0;
}

static int overlap(const piece *a, const piece *b) {
    return a->row < b->row + b->blocks.n_rows && b->row < a->row + a->blocks.n_rows &&
           a->col < b->col + b->blocks.n_cols && b->col < a->col + a->blocks.n_cols;
}

enum { OVERLAP = 1 };

/* A mapped weight remembers where its blocks are. Nobody may be multiplying by it meanwhile. */
static int add_piece(WeightObject *to, const piece *added, const Py_buffer *array) {
    size_t n = (size_t)to->w.n_pieces + 1;
    for (size_t i = 0; i + 1 < n; i++)
        if (overlap(&to->pieces[i], added)) return OVERLAP;
    piece *pieces = realloc(to->pieces, n * sizeof *pieces);
    if (pieces) to->w.pieces = to->pieces = pieces;
    Py_buffer *arrays = pieces ? realloc(to->arrays, n * sizeof *arrays) : NULL;
    if (!arrays) return -1;
    to->arrays = arrays;
    to->arrays[n - 1] = *array;
    to->pieces[n - 1] = *added;
    to->w.n_pieces++;
    return 0;
}

static PyObject *py_pack(PyObject *module, PyObject *args) {
    (void)module;
    const char *name;
    PyObject *data, *target;
    Py_ssize_t n_rows, n_cols, row, col;
    int threads, failed = 1;
    opened all = {.n = 0};
    if (!PyArg_ParseTuple(args, "sOnnOnnO&", &name, &data, &n_rows, &n_cols, &target, &row, &col, parse_threads,
                          &threads))
        return NULL;
    int type = find_name(name, file_type_names, N_FILE_TYPES);
    const weight *to = as_weight(target);
    Py_buffer *view = type >= 0 && to ? array(&all, data, "data", BYTES, 1, 0) : NULL;
    if (view) {
        file_blocks from = {type, n_rows, n_cols, view->buf};
        if (check_pack(&from, to, row, col, view->len)) return finish(&all, failed);
        if (to->data) {
            WITHOUT_GIL(failed, pack(&from, to, row, col, threads));
        } else {
            piece added = {from, row, col};
            WITHOUT_GIL(failed, add_piece((WeightObject *)target, &added, view));
            if (failed == OVERLAP) fail(PyExc_ValueError, "the weight has some of these blocks");
            if (!failed) all.n = 0; /* the weight keeps the array */
        }
    }
    return finish(&all, failed);
}

static int open_products(opened *all, PyObject *weights, PyObject *outs, const Py_buffer *x, Py_ssize_t n,
                         const weight **w, float **out) {
    for (Py_ssize_t i = 0; i < n; i++) {
        if (!(w[i] = as_whole_weight(PyTuple_GetItem(weights, i)))) return -1;
        if (w[i]->n_in != x->shape[1])
            return fail(PyExc_ValueError, "x has %zd columns, a weight %ld", x->shape[1], w[i]->n_in);
        Py_buffer *view = array(all, PyTuple_GetItem(outs, i), "out", FLOAT32, 2, 1);
        if (!view) return -1;
        if (view->shape[0] != x->shape[0] || view->shape[1] != w[i]->n_out)
            return fail(PyExc_ValueError, "out must be [%zd, %ld]", x->shape[0], w[i]->n_out);
        out[i] = view->buf;
    }
    return 0;
}

static PyObject *py_matmul(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *input, *weights, *outs;
    int threads, failed = 1;
    opened all = {.n = 0};
    const weight *w[MAX_WEIGHTS];
    float *out[MAX_WEIGHTS];
    if (!PyArg_ParseTuple(args, "OO!O!O&", &input, &PyTuple_Type, &weights, &PyTuple_Type, &outs, parse_threads,
                          &threads))
        return NULL;
    Py_ssize_t n = PyTuple_Size(weights);
    if (n < 1 || n > MAX_WEIGHTS || PyTuple_Size(outs) != n) {
        fail(PyExc_ValueError, "matmul takes 1 to %d weights and as many outputs", MAX_WEIGHTS);
        return NULL;
    }
    Py_buffer *x = array(&all, input, "x", FLOAT32, 2, 0);
    if (x && !open_products(&all, weights, outs, x, n, w, out)) {
        failed = 0;
        if (x->shape[0] > 0) WITHOUT_GIL(failed, matmul(x->buf, x->shape[0], n, w, out, threads));
    }
    return finish(&all, failed);
}

/* Into a copy, since the array may change while Python is unlocked, or `out` lie in it. */
static int copy_rows(const Py_buffer *rows, const Py_buffer *out, const weight *w, int64_t *copy) {
    if (out->shape[0] != rows->shape[0] || out->shape[1] != w->n_in)
        return fail(PyExc_ValueError, "out must be [%zd, %ld]", rows->shape[0], w->n_in);
    if (!copy) return -1;
    for (Py_ssize_t i = 0; i < rows->shape[0]; i++) {
        int64_t row = copy[i] = ((const int64_t *)rows->buf)[i];
        if (row < 0 || row >= w->n_out) return fail(PyExc_IndexError, "row %lld of %ld", (long long)row, w->n_out);
    }
    return 0;
}

static PyObject *py_rows(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *object, *indices, *output;
    int failed = 1;
    opened all = {.n = 0};
    if (!PyArg_ParseTuple(args, "OOO", &object, &indices, &output)) return NULL;
    const weight *w = as_whole_weight(object);
    Py_buffer *rows = w ? array(&all, indices, "rows", INT64, 1, 0) : NULL;
    Py_buffer *out = rows ? array(&all, output, "out", FLOAT32, 2, 1) : NULL;
    int64_t *copy = out ? PyMem_Malloc((size_t)rows->len) : NULL;
    if (out && !copy_rows(rows, out, w, copy))
        WITHOUT_GIL(failed, unpack_rows(w, copy, rows->shape[0], out->buf));
    PyMem_Free(copy);
    return finish(&all, failed);
}

static PyObject *py_rms_norm(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *input, *scale_object, *output;
    float eps;
    int threads, failed = 1;
    opened all = {.n = 0};
    if (!PyArg_ParseTuple(args, "OOfOO&", &input, &scale_object, &eps, &output, parse_threads, &threads)) return NULL;
    Py_buffer *x = array(&all, input, "x", FLOAT32, 2, 0);
    Py_buffer *scale = x ? array(&all, scale_object, "weight", FLOAT32, 1, 0) : NULL;
    Py_buffer *out = scale ? array(&all, output, "out", FLOAT32, 2, 1) : NULL;
    if (out && (scale->shape[0] != x->shape[1] || !same_shape(x, out)))
        fail(PyExc_ValueError, "the shapes of x, weight and out differ");
    else if (out)
        WITHOUT_GIL(failed, rms_norm(x->buf, scale->buf, eps, x->shape[0], x->shape[1], out->buf, threads));
    return finish(&all, failed);
}

static PyObject *py_swiglu(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *gate_object, *up_object, *output;
    int threads, failed = 1;
    opened all = {.n = 0};
    if (!PyArg_ParseTuple(args, "OOOO&", &gate_object, &up_object, &output, parse_threads, &threads)) return NULL;
    Py_buffer *gate = array(&all, gate_object, "gate", FLOAT32, -1, 0);
    Py_buffer *up = gate ? array(&all, up_object, "up", FLOAT32, -1, 0) : NULL;
    Py_buffer *out = up ? array(&all, output, "out", FLOAT32, -1, 1) : NULL;
    if (out && (!same_shape(gate, up) || !same_shape(gate, out)))
        fail(PyExc_ValueError, "the shapes of gate, up and out differ");
    else if (out)
        WITHOUT_GIL(failed, swiglu(gate->buf, up->buf, count(gate), out->buf, threads));
    return finish(&all, failed);
}

static PyObject *py_rope(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *input, *freqs_object, *output;
    int threads, failed = 1;
    opened all = {.n = 0};
    if (!PyArg_ParseTuple(args, "OOOO&", &input, &freqs_object, &output, parse_threads, &threads)) return NULL;
    Py_buffer *x = array(&all, input, "x", FLOAT32, 3, 0);
    Py_buffer *freqs = x ? array(&all, freqs_object, "freqs", "Zf", 2, 0) : NULL;
    Py_buffer *out = freqs ? array(&all, output, "out", FLOAT32, 3, 1) : NULL;
    if (out && (!same_shape(x, out) || freqs->shape[0] != x->shape[0] || 2 * freqs->shape[1] != x->shape[2]))
        fail(PyExc_ValueError, "the shapes of x, freqs and out don't match");
    else if (out)
        WITHOUT_GIL(failed, rope(x->buf, freqs->buf, x->shape[0], x->shape[1], x->shape[2], out->buf, threads));
    return finish(&all, failed);
}

/* k, v: [n_tokens, n_kv_heads, head_dim]; the layer's keys and values: [n_kv_heads, n_ctx, head_dim]. */
static int check_heads(const Py_buffer *q, const Py_buffer *k, const Py_buffer *v, const Py_buffer *keys,
                       const Py_buffer *values, const Py_buffer *out, Py_ssize_t pos) {
    Py_ssize_t n_tokens = q->shape[0], n_heads = q->shape[1], head_dim = q->shape[2], n_kv = k->shape[1];
    if (!same_shape(k, v) || !same_shape(keys, values) || k->shape[0] != n_tokens ||
        k->shape[2] != head_dim || keys->shape[0] != n_kv || keys->shape[2] != head_dim)
        return fail(PyExc_ValueError, "the shapes of q, k, v and the cache don't match");
    if (out->shape[0] != n_tokens || out->shape[1] != n_heads * head_dim)
        return fail(PyExc_ValueError, "out must be [%zd, %zd]", n_tokens, n_heads * head_dim);
    if (n_tokens < 1 || pos < 0 || pos > keys->shape[1] - n_tokens)
        return fail(PyExc_ValueError, "%zd tokens from position %zd on don't fit into a cache of %zd",
                    n_tokens, pos, keys->shape[1]);
    if (head_dim < 1 || head_dim > MAX_HEAD_DIM || n_kv < 1 || n_heads < 1 || n_heads % n_kv ||
        n_heads / n_kv > MAX_SHARED)
        return fail(PyExc_ValueError, "heads of width %zd, %zd to %zd, are not supported", head_dim, n_heads,
                    n_kv);
    return 0;
}

static int store_and_attend(const heads *h, const float *k, const float *v, uint16_t *keys, uint16_t *values,
                            int threads) {
    store_heads(k, h->n_tokens, h->n_kv_heads, h->head_dim, h->n_ctx, h->pos, keys);
    store_heads(v, h->n_tokens, h->n_kv_heads, h->head_dim, h->n_ctx, h->pos, values);
    return attention(h, threads);
}

static PyObject *py_attention(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *objects[6];
    Py_ssize_t pos;
    int threads, failed = 1;
    opened all = {.n = 0};
    if (!PyArg_ParseTuple(args, "OOOOOnOO&", &objects[0], &objects[1], &objects[2], &objects[3], &objects[4],
                          &pos, &objects[5], parse_threads, &threads))
        return NULL;
    Py_buffer *q = array(&all, objects[0], "q", FLOAT32, 3, 0);
    Py_buffer *k = q ? array(&all, objects[1], "k", FLOAT32, 3, 0) : NULL;
    Py_buffer *v = k ? array(&all, objects[2], "v", FLOAT32, 3, 0) : NULL;
    Py_buffer *keys = v ? array(&all, objects[3], "keys", FLOAT16, 3, 1) : NULL;
    Py_buffer *values = keys ? array(&all, objects[4], "values", FLOAT16, 3, 1) : NULL;
    Py_buffer *out = values ? array(&all, objects[5], "out", FLOAT32, 2, 1) : NULL;
    if (out && !check_heads(q, k, v, keys, values, out, pos)) {
        heads h = {q->buf,      keys->buf,   values->buf, out->buf,       q->shape[0],
                   q->shape[1], k->shape[1], q->shape[2], keys->shape[1], pos};
        WITHOUT_GIL(failed, store_and_attend(&h, k->buf, v->buf, keys->buf, values->buf, threads));
    }
    return finish(&all, failed);
}

/* from: [n_rows, n_cols] of numbers; out: as many bytes as they have in the other type. */
static int check_cast(const Py_buffer *from, int to, const Py_buffer *out) {
    Py_ssize_t n_cols = from->shape[1];
    if (to == FILE_BF16) return fail(PyExc_ValueError, "nothing is cast to bf16");
    if (to >= FILE_Q4_0 && n_cols % BLOCK)
        return fail(PyExc_ValueError, "rows of blocks hold a multiple of %d weights, not %zd", BLOCK, n_cols);
    if (out->len != file_row_bytes(to, count(from)) || (uintptr_t)out->buf % sizeof(float))
        return fail(PyExc_ValueError, "out must be aligned and have %ld bytes", file_row_bytes(to, count(from)));
    return 0;
}

static PyObject *py_cast(PyObject *module, PyObject *args) {
    (void)module;
    static const char *const formats[] = {[FILE_F32] = "f", [FILE_F16] = "e", [FILE_BF16] = "H"};
    const char *name, *to_name;
    PyObject *numbers, *target;
    int result = -1;
    opened all = {.n = 0};
    if (!PyArg_ParseTuple(args, "sOsO", &name, &numbers, &to_name, &target)) return NULL;
    int type = find_name(name, file_type_names, FILE_BF16 + 1), to = find_name(to_name, file_type_names, N_FILE_TYPES);
    Py_buffer *x = type >= 0 && to >= 0 ? array(&all, numbers, "numbers", formats[type], 2, 0) : NULL;
    Py_buffer *out = x ? array(&all, target, "out", BYTES, 1, 1) : NULL;
    if (out && !check_cast(x, to, out)) {
        file_blocks from = {type, x->shape[0], x->shape[1], x->buf};
        const kernels *k = active_kernels(); /* another thread may choose others meanwhile */
        Py_BEGIN_ALLOW_THREADS;
        result = k->cast(&from, to, out->buf);
        Py_END_ALLOW_THREADS;
        if (result) fail(PyExc_OverflowError, "NaN or numbers too large for %s", to_name);
    }
    return finish(&all, result);
}

static PyObject *py_read_all(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *object;
    int threads;
    uint64_t sum;
    opened all = {.n = 0};
    if (!PyArg_ParseTuple(args, "OO&", &object, parse_threads, &threads)) return NULL;
    Py_buffer *data = array(&all, object, "data", BYTES, 1, 0);
    if (!data) return NULL;
    WITHOUT_GIL(sum, read_all(data->buf, (size_t)data->len, threads));
    PyBuffer_Release(data);
    return PyLong_FromUnsignedLongLong(sum);
}

static PyObject *py_multiply_all(PyObject *module, PyObject *args) {
    (void)module;
    int rounds, threads;
    double products;
    if (!PyArg_ParseTuple(args, "iO&", &rounds, parse_threads, &threads)) return NULL;
    WITHOUT_GIL(products, multiply_all(rounds, threads));
    return PyFloat_FromDouble(products);
}

static PyObject *py_guard(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer view;
    const char *name;
    if (!PyArg_ParseTuple(args, "y*y", &view, &name)) return NULL;
    int file = guard(view.buf, (size_t)view.len, name);
    PyBuffer_Release(&view);
    return PyLong_FromLong(file);
}

static int parse_guarded(PyObject *args, const char *format, int *file, int *change) {
    if (!PyArg_ParseTuple(args, format, file, change)) return -1;
    return *file < 0 || *file >= MAX_GUARDED ? fail(PyExc_IndexError, "no file has the number %d", *file) : 0;
}

static PyObject *py_unguard(PyObject *module, PyObject *args) {
    (void)module;
    int file;
    if (parse_guarded(args, "i", &file, NULL)) return NULL;
    unguard(file);
    Py_RETURN_NONE;
}

static PyObject *py_watch(PyObject *module, PyObject *args) {
    (void)module;
    int file, change;
    if (parse_guarded(args, "ii", &file, &change)) return NULL;
    guard_watch(file, change);
    Py_RETURN_NONE;
}

static PyObject *py_lost(PyObject *module, PyObject *args) {
    (void)module;
    int file;
    if (parse_guarded(args, "i", &file, NULL)) return NULL;
    return PyBool_FromLong(guard_lost(file));
}

static PyObject *py_levels(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    for (const char *const *name = available_levels(); list && *name; name++) {
        PyObject *item = PyUnicode_FromString(*name);
        if (!item || PyList_Append(list, item)) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *py_level(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(active_kernels()->name);
}

static PyObject *py_amx_obstacle(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *found = amx_obstacle();
    if (found) return PyUnicode_FromString(found);
    Py_RETURN_NONE;
}

static PyObject *py_use_level(PyObject *module, PyObject *args) {
    (void)module;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    int failed;
    WITHOUT_GIL(failed, use_level(name));
    if (!failed) Py_RETURN_NONE;
    fail(PyExc_ValueError, "this computer has no level '%s'", name);
    return NULL;
}

static PyMethodDef functions[] = {
    {"weight_bytes", py_weight_bytes, METH_VARARGS, "weight_bytes(type, n_out, n_in): memory a Weight needs"},
    {"pack", py_pack, METH_VARARGS,
     "pack(file_type, data, n_rows, n_cols, weight, row, col, threads): put a file's blocks into a Weight"},
    {"matmul", py_matmul, METH_VARARGS, "matmul(x, weights, outs, threads): each out = x @ weight.T"},
    {"rows", py_rows, METH_VARARGS, "rows(weight, indices, out): rows of a weight as float32"},
    {"rms_norm", py_rms_norm, METH_VARARGS, "rms_norm(x, weight, eps, out, threads)"},
    {"swiglu", py_swiglu, METH_VARARGS, "swiglu(gate, up, out, threads)"},
    {"rope", py_rope, METH_VARARGS, "rope(x, freqs, out, threads)"},
    {"attention", py_attention, METH_VARARGS, "attention(q, k, v, keys, values, pos, out, threads)"},
    {"cast", py_cast, METH_VARARGS, "cast(type, numbers, to, out): numbers as bytes of another type; in this thread"},
    {"read_all", py_read_all, METH_VARARGS, "read_all(data, threads): the sum of its words, as fast as memory allows"},
    {"multiply_all", py_multiply_all, METH_VARARGS,
     "multiply_all(rounds, threads): the number of products of registers it has done, as fast as the level can"},
    {"guard", py_guard, METH_VARARGS, "guard(mapped, name): the number of a mapped file that may be cut short, or -1"},
    {"unguard", py_unguard, METH_VARARGS, "unguard(file): it is about to be unmapped"},
    {"watch", py_watch, METH_VARARGS, "watch(file, change): +1: read zeros where it is cut short, `lost` will be asked"},
    {"lost", py_lost, METH_VARARGS, "lost(file): whether zeros were read in place of it"},
    {"levels", py_levels, METH_NOARGS, "levels(): what this CPU can run, best first"},
    {"level", py_level, METH_NOARGS, "level(): what is running"},
    {"amx_obstacle", py_amx_obstacle, METH_NOARGS, "amx_obstacle(): why this CPU's AMX can't be used, or None"},
    {"use_level", py_use_level, METH_VARARGS, "use_level(name): run another"},
    {NULL, NULL, 0, NULL},
};

/* The outputs of a long prompt are megabytes each. glibc would give them back to the system as they are freed and
 * get zeroed pages for the next ones, which took a fifth of the time to read a prompt on a small model. */
static void keep_freed_memory(void) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
    mallopt(M_TOP_PAD, 16 << 20);
#endif
}

static int fill_module(PyObject *module) {
    keep_freed_memory();
    weight_type_object = (PyTypeObject *)PyType_FromSpec(&weight_spec);
    if (!weight_type_object) return -1;
    const char *wanted = getenv("TINYLLAMA_CPU");
    if (wanted && *wanted && use_level(wanted)) {
        const char *found = strcmp(wanted, "amx") ? NULL : amx_obstacle();
        return fail(PyExc_ImportError, "TINYLLAMA_CPU=%s: %s", wanted, found ? found : "this computer has no such level");
    }
    active_kernels(); /* chosen now, before there are threads */
    return PyModule_AddObjectRef(module, "Weight", (PyObject *)weight_type_object);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Operations of a LLaMA in C; ext/README.md has the map.", 0, functions,
    slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
