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

static int fail(PyObject *kind, const char *format, ...) {
    va_list values;
    va_start(values, format);
    PyErr_FormatV(kind, format, values);
    va_end(values);
    return -1;
}

static PyObject *result(int failed) {
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

/* ---- arrays ---- */

/* The formats of NumPy's types, as the buffer protocol spells them. */
#define FLOAT32 "f"
#define FLOAT16 "e"
#define COMPLEX64 "Zf"
#define INT64 "l"
#define BYTES "B"

/* An argument that must be a C-contiguous, aligned array of a format and a number of dimensions (-1: any). */
typedef struct {
    const char *name, *format;
    int ndim, writable;
    Py_buffer view;
} array;

static void close_array(array *a) { PyBuffer_Release(&a->view); }

/* Closed wherever the function returns. */
#define ARRAY __attribute__((cleanup(close_array))) array
#define INPUT(name, format, ndim) {name, format, ndim, 0, {.obj = NULL}}
#define OUTPUT(name, format, ndim) {name, format, ndim, 1, {.obj = NULL}}

static Py_ssize_t count(const array *a) { return a->view.len / a->view.itemsize; }

static int is_contiguous(const Py_buffer *view) {
    Py_ssize_t expected = view->itemsize;
    if (!view->strides) return 1;
    for (int i = view->ndim - 1; i >= 0; i--) {
        if (view->shape[i] != 1 && view->strides[i] != expected) return 0;
        expected *= view->shape[i];
    }
    return 1;
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

static int same_format(const Py_buffer *view, const char *want) {
    const char *have = view->format ? view->format : "";
    if (*have && strchr("<=@", *have)) have++;
    return view->itemsize == size_of(want) && (!strcmp(have, want) || (*want == 'l' && !strcmp(have, "q")));
}

/* For "O&" of PyArg_ParseTuple, as all parse_...: 0 where it fails. */
static int parse_array(PyObject *object, void *opened) {
    array *a = opened;
    Py_buffer *view = &a->view;
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT | (a->writable ? PyBUF_WRITABLE : 0))) return 0;
    if (!same_format(view, a->format))
        fail(PyExc_TypeError, "%s must be an array of type '%s', not '%s' of %zd bytes", a->name, a->format,
             view->format ? view->format : "", view->itemsize);
    else if (a->ndim >= 0 && view->ndim != a->ndim)
        fail(PyExc_ValueError, "%s must have %d dimensions, not %d", a->name, a->ndim, view->ndim);
    else if (!is_contiguous(view))
        fail(PyExc_ValueError, "%s must be contiguous", a->name);
    else if ((uintptr_t)view->buf % (uintptr_t)view->itemsize)
        fail(PyExc_ValueError, "%s is not aligned", a->name);
    else
        return 1;
    return 0;
}

static int same_shape(const array *a, const array *b) {
    for (int i = 0; a->view.ndim == b->view.ndim && i < a->view.ndim; i++)
        if (a->view.shape[i] != b->view.shape[i]) return 0;
    return a->view.ndim == b->view.ndim;
}

static int parse_threads(PyObject *object, void *threads) {
    long n = PyLong_AsLong(object);
    if (n < 1 && !PyErr_Occurred()) fail(PyExc_ValueError, "there is at least one thread, not %ld", n);
    *(int *)threads = n < MAX_THREADS ? (int)n : MAX_THREADS;
    return n >= 1;
}

static int parse_type(PyObject *object, void *type) {
    Py_ssize_t size;
    const char *name = PyUnicode_AsUTF8AndSize(object, &size);
    for (int i = 0; name && i < N_TYPES; i++) {
        if (strcmp(name, types[i].name) || (size_t)size != strlen(name)) continue;
        *(weight_type *)type = i;
        return 1;
    }
    if (name) fail(PyExc_ValueError, "there is no type '%s'", name);
    return 0;
}

/* ---- Weight ---- */

typedef struct {
    PyObject_HEAD
    weight w;
    slab *slab;    /* that it lies in */
    piece *pieces; /* of a mapped weight, and the arrays that they lie in */
    Py_buffer *arrays;
} WeightObject;

static PyTypeObject *weight_type_object;

static int check_layout(weight_type type, Py_ssize_t n_out, Py_ssize_t n_in) {
    if (types[type].prepared != type)
        return fail(PyExc_ValueError, "%s is prepared as %s", types[type].name, types[types[type].prepared].name);
    if (n_out < 1 || n_in < 1 || n_out > INT32_MAX || n_in > INT32_MAX)
        return fail(PyExc_ValueError, "no weight has the shape [%zd, %zd]", n_out, n_in);
    if (n_in % types[type].block)
        return fail(PyExc_ValueError, "rows of blocks hold a multiple of %d weights, not %zd", BLOCK, n_in);
    return (double)n_out * (double)n_in > 1e15 ? fail(PyExc_ValueError, "no computer has the memory for it") : 0;
}

static slab *take_memory_for(const weight *w, uint8_t **memory) {
    size_t n_bytes = weight_bytes(w);
    slab *taken = take_memory(n_bytes, memory);
    if (!taken) fail(PyExc_MemoryError, "the system gave no %zu MB for a weight", n_bytes >> 20);
    return taken;
}

static PyObject *weight_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"type", "n_out", "n_in", "factor", "mapped", NULL};
    weight_type of;
    Py_ssize_t n_out, n_in;
    float factor = 1;
    int mapped = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&nn|f$p", names, parse_type, &of, &n_out, &n_in, &factor,
                                     &mapped) ||
        check_layout(of, n_out, n_in))
        return NULL;
    WeightObject *self = (WeightObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return NULL;
    weight_layout(&self->w, of, n_out, n_in);
    self->w.factor = factor;
    if (mapped || (self->slab = take_memory_for(&self->w, &self->w.data))) return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static void let_go_of_arrays(WeightObject *self) {
    for (long i = 0; i < self->w.n_pieces; i++) PyBuffer_Release(&self->arrays[i]);
    free(self->pieces);
    free(self->arrays);
    self->w.n_pieces = 0, self->w.pieces = self->pieces = NULL, self->arrays = NULL;
}

static void weight_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    WeightObject *self = (WeightObject *)object;
    if (self->slab) return_memory(self->slab);
    let_go_of_arrays(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static const weight *weight_of(PyObject *object) { return &((WeightObject *)object)->w; }

static PyObject *weight_shape(PyObject *object, void *closure) {
    (void)closure;
    return Py_BuildValue("ll", weight_of(object)->n_out, weight_of(object)->n_in);
}

static PyObject *weight_type_name(PyObject *object, void *closure) {
    (void)closure;
    return PyUnicode_FromString(types[weight_of(object)->type].name);
}

static PyObject *weight_nbytes(PyObject *object, void *closure) {
    (void)closure;
    const weight *w = weight_of(object);
    return PyLong_FromSize_t(w->data ? weight_bytes(w) : 0);
}

static long piece_bytes(const piece *p) { return p->blocks.n_rows * file_row_bytes(p->blocks.type, p->blocks.n_cols); }

static PyObject *weight_bytes_read(PyObject *object, void *closure) {
    (void)closure;
    const weight *w = weight_of(object);
    size_t n = w->data ? weight_bytes(w) : 0;
    for (long i = 0; !w->data && i < w->n_pieces; i++) n += (size_t)piece_bytes(&w->pieces[i]);
    return PyLong_FromSize_t(n);
}

static PyGetSetDef weight_attributes[] = {
    {"shape", weight_shape, NULL, "(n_out, n_in)", NULL},
    {"type", weight_type_name, NULL, "which kernels multiply by it", NULL},
    {"nbytes", weight_nbytes, NULL, "memory it takes beside its file", NULL},
    {"bytes_read", weight_bytes_read, NULL, "what a product reads, in its memory or in the file", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot weight_slots[] = {
    {Py_tp_new, weight_new},
    {Py_tp_dealloc, weight_dealloc},
    {Py_tp_getset, weight_attributes},
    {Py_tp_doc, "Weight(type, n_out, n_in, factor=1.0, *, mapped=False): a weight of zeros, for `pack` to fill. It owns "
                "its memory; a mapped one has none and keeps the arrays that its blocks lie in."},
    {0, NULL},
};

static PyType_Spec weight_spec = {
    "tinyllama._native.Weight", sizeof(WeightObject), 0, Py_TPFLAGS_DEFAULT, weight_slots,
};

static int parse_weight(PyObject *object, void *found) {
    *(WeightObject **)found = (WeightObject *)object;
    if (PyObject_TypeCheck(object, weight_type_object)) return 1;
    fail(PyExc_TypeError, "expected a Weight");
    return 0;
}

/* A weight with all its blocks. Those of a mapped one never overlap. */
static int parse_whole_weight(PyObject *object, void *found) {
    WeightObject *self;
    if (!parse_weight(object, &self)) return 0;
    const weight *w = *(const weight **)found = &self->w;
    long n = 0;
    if (w->data) return 1;
    for (const piece *p = w->pieces; p < w->pieces + w->n_pieces; p++) n += p->blocks.n_rows * p->blocks.n_cols;
    if (n == w->n_out * w->n_in) return 1;
    fail(PyExc_ValueError, "some of the weight's blocks are missing");
    return 0;
}

/* ---- functions ---- */

static int check_pack(const piece *p, const weight *to, Py_ssize_t size) {
    const file_blocks *from = &p->blocks;
    if (types[from->type].prepared != to->type)
        return fail(PyExc_ValueError, "these blocks don't become a weight of this type");
    if (p->row < 0 || from->n_rows < 0 || from->n_rows > to->n_out || p->row > to->n_out - from->n_rows ||
        p->col < 0 || from->n_cols < 0 || from->n_cols > to->n_in || p->col > to->n_in - from->n_cols)
        return fail(PyExc_ValueError, "the blocks don't fit into the weight");
    if (p->col % types[to->type].block || from->n_cols % types[from->type].block)
        return fail(PyExc_ValueError, "a block can't be cut");
    if (size != piece_bytes(p)) return fail(PyExc_ValueError, "%zd bytes are not the size of the blocks", size);
    return 0;
}

static int overlap(const piece *a, const piece *b) {
    return a->row < b->row + b->blocks.n_rows && b->row < a->row + a->blocks.n_rows &&
           a->col < b->col + b->blocks.n_cols && b->col < a->col + a->blocks.n_cols;
}

enum { OVERLAP = 1 };

/* A mapped weight remembers where its blocks are. With both locks: neither Python nor a product may look at it. */
static int add_piece(WeightObject *to, const piece *added, const Py_buffer *view) {
    size_t n = (size_t)to->w.n_pieces + 1;
    for (size_t i = 0; i + 1 < n; i++)
        if (overlap(&to->pieces[i], added)) return OVERLAP;
    piece *pieces = realloc(to->pieces, n * sizeof *pieces);
    if (pieces) to->w.pieces = to->pieces = pieces;
    Py_buffer *arrays = pieces ? realloc(to->arrays, n * sizeof *arrays) : NULL;
    if (!arrays) return -1;
    to->arrays = arrays;
    to->arrays[n - 1] = *view;
    to->pieces[n - 1] = *added;
    to->w.n_pieces++;
    return 0;
}

static PyObject *py_pack(PyObject *module, PyObject *args) {
    (void)module;
    weight_type type;
    ARRAY data = INPUT("data", BYTES, 1);
    WeightObject *to;
    Py_ssize_t n_rows, n_cols, row, col;
    int threads, failed;
    if (!PyArg_ParseTuple(args, "O&O&nnO&nnO&", parse_type, &type, parse_array, &data, &n_rows, &n_cols, parse_weight,
                          &to, &row, &col, parse_threads, &threads))
        return NULL;
    piece added = {{type, n_rows, n_cols, data.view.buf}, row, col};
    if (check_pack(&added, &to->w, data.view.len)) return NULL;
    if (to->w.data) {
        WITHOUT_GIL(failed, pack(&added.blocks, &to->w, row, col, threads));
        return result(failed);
    }
    pool_lock();
    failed = add_piece(to, &added, &data.view);
    pool_unlock();
    if (failed == OVERLAP) fail(PyExc_ValueError, "the weight has some of these blocks");
    if (!failed) data.view.obj = NULL; /* the weight keeps the array */
    return result(failed);
}

/* With the pool locked, so that no product looks at the weight; 0 if another thread was faster. From then on nobody looks
 * at its pieces, and who holds Python's lock may let go of them. */
static int settle(WeightObject *self, slab *slab, uint8_t *memory, int threads) {
    if (self->w.data) return 0;
    pack_pieces(&self->w, memory, threads);
    self->slab = slab;
    __atomic_store_n(&self->w.data, memory, __ATOMIC_RELEASE); /* Python may ask for it at any time */
    return 1;
}

static PyObject *py_settle(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *object;
    const weight *w;
    uint8_t *memory;
    int threads, settled;
    if (!PyArg_ParseTuple(args, "OO&", &object, parse_threads, &threads) || !parse_whole_weight(object, &w)) return NULL;
    if (w->data) Py_RETURN_NONE;
    slab *slab = take_memory_for(w, &memory);
    if (!slab) return NULL;
    WITHOUT_GIL(settled, settle((WeightObject *)object, slab, memory, threads));
    if (settled)
        let_go_of_arrays((WeightObject *)object);
    else
        return_memory(slab);
    Py_RETURN_NONE;
}

enum { MAX_WEIGHTS = 16 };

typedef struct {
    int n;
    array all[MAX_WEIGHTS];
} arrays;

static void close_arrays(arrays *opened) {
    for (int i = 0; i < opened->n; i++) close_array(&opened->all[i]);
}

static int parse_products(PyObject *weights, PyObject *outs, const array *x, const weight **w, arrays *opened) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(weights); i++) {
        array *out = &opened->all[opened->n++];
        *out = (array)OUTPUT("out", FLOAT32, 2);
        if (!parse_whole_weight(PyTuple_GetItem(weights, i), &w[i])) return -1;
        if (w[i]->n_in != x->view.shape[1])
            return fail(PyExc_ValueError, "x has %zd columns, a weight %ld", x->view.shape[1], w[i]->n_in);
        if (!parse_array(PyTuple_GetItem(outs, i), out)) return -1;
        if (out->view.shape[0] != x->view.shape[0] || out->view.shape[1] != w[i]->n_out)
            return fail(PyExc_ValueError, "out must be [%zd, %ld]", x->view.shape[0], w[i]->n_out);
    }
    return 0;
}

static PyObject *py_matmul(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *weights, *outs;
    ARRAY x = INPUT("x", FLOAT32, 2);
    __attribute__((cleanup(close_arrays))) arrays opened = {.n = 0};
    const weight *w[MAX_WEIGHTS];
    float *out[MAX_WEIGHTS];
    int threads, failed = 0;
    if (!PyArg_ParseTuple(args, "O&O!O!O&", parse_array, &x, &PyTuple_Type, &weights, &PyTuple_Type, &outs,
                          parse_threads, &threads))
        return NULL;
    Py_ssize_t n = PyTuple_Size(weights);
    if (n < 1 || n > MAX_WEIGHTS || PyTuple_Size(outs) != n)
        return result(fail(PyExc_ValueError, "matmul takes 1 to %d weights and as many outputs", MAX_WEIGHTS));
    if (parse_products(weights, outs, &x, w, &opened)) return NULL;
    for (int i = 0; i < n; i++) out[i] = opened.all[i].view.buf;
    if (x.view.shape[0] > 0) WITHOUT_GIL(failed, matmul(x.view.buf, x.view.shape[0], n, w, out, threads));
    return result(failed);
}

/* Into a copy, since the array may change while Python is unlocked, or `out` lie in it. */
static int copy_rows(const array *rows, const weight *w, int64_t *copy) {
    for (Py_ssize_t i = 0; copy && i < count(rows); i++) {
        int64_t row = copy[i] = ((const int64_t *)rows->view.buf)[i];
        if (row < 0 || row >= w->n_out) return fail(PyExc_IndexError, "row %lld of %ld", (long long)row, w->n_out);
    }
    return copy ? 0 : -1;
}

static PyObject *py_rows(PyObject *module, PyObject *args) {
    (void)module;
    const weight *w;
    ARRAY rows = INPUT("rows", INT64, 1), out = OUTPUT("out", FLOAT32, 2);
    if (!PyArg_ParseTuple(args, "O&O&O&", parse_whole_weight, &w, parse_array, &rows, parse_array, &out)) return NULL;
    if (out.view.shape[0] != count(&rows) || out.view.shape[1] != w->n_in)
        return result(fail(PyExc_ValueError, "out must be [%zd, %ld]", count(&rows), w->n_in));
    int64_t *copy = PyMem_Malloc((size_t)rows.view.len);
    int failed = copy_rows(&rows, w, copy);
    if (!failed) WITHOUT_GIL(failed, unpack_rows(w, copy, count(&rows), out.view.buf));
    PyMem_Free(copy);
    return result(failed);
}

static PyObject *py_rms_norm(PyObject *module, PyObject *args) {
    (void)module;
    ARRAY x = INPUT("x", FLOAT32, 2), scale = INPUT("weight", FLOAT32, 1), out = OUTPUT("out", FLOAT32, 2);
    float eps;
    int threads, failed;
    if (!PyArg_ParseTuple(args, "O&O&fO&O&", parse_array, &x, parse_array, &scale, &eps, parse_array, &out,
                          parse_threads, &threads))
        return NULL;
    const Py_ssize_t *shape = x.view.shape;
    if (count(&scale) != shape[1] || !same_shape(&x, &out))
        return result(fail(PyExc_ValueError, "the shapes of x, weight and out differ"));
    WITHOUT_GIL(failed, rms_norm(x.view.buf, scale.view.buf, eps, shape[0], shape[1], out.view.buf, threads));
    return result(failed);
}

static PyObject *py_swiglu(PyObject *module, PyObject *args) {
    (void)module;
    ARRAY gate = INPUT("gate", FLOAT32, -1), up = INPUT("up", FLOAT32, -1), out = OUTPUT("out", FLOAT32, -1);
    int threads, failed;
    if (!PyArg_ParseTuple(args, "O&O&O&O&", parse_array, &gate, parse_array, &up, parse_array, &out, parse_threads,
                          &threads))
        return NULL;
    if (!same_shape(&gate, &up) || !same_shape(&gate, &out))
        return result(fail(PyExc_ValueError, "the shapes of gate, up and out differ"));
    WITHOUT_GIL(failed, swiglu(gate.view.buf, up.view.buf, count(&gate), out.view.buf, threads));
    return result(failed);
}

static PyObject *py_rope(PyObject *module, PyObject *args) {
    (void)module;
    ARRAY x = INPUT("x", FLOAT32, 3), freqs = INPUT("freqs", COMPLEX64, 2), out = OUTPUT("out", FLOAT32, 3);
    int threads, failed;
    if (!PyArg_ParseTuple(args, "O&O&O&O&", parse_array, &x, parse_array, &freqs, parse_array, &out, parse_threads,
                          &threads))
        return NULL;
    const Py_ssize_t *shape = x.view.shape;
    if (!same_shape(&x, &out) || freqs.view.shape[0] != shape[0] || 2 * freqs.view.shape[1] != shape[2])
        return result(fail(PyExc_ValueError, "the shapes of x, freqs and out don't match"));
    WITHOUT_GIL(failed, rope(x.view.buf, freqs.view.buf, shape[0], shape[1], shape[2], out.view.buf, threads));
    return result(failed);
}

/* k, v: [n_tokens, n_kv_heads, head_dim]; the layer's keys and values: [n_kv_heads, n_ctx, head_dim]. */
static int check_heads(const heads *h, const array *k, const array *v, const array *keys, const array *values,
                       const array *out) {
    if (!same_shape(k, v) || !same_shape(keys, values) || k->view.shape[0] != h->n_tokens ||
        k->view.shape[2] != h->head_dim || keys->view.shape[0] != h->n_kv_heads || keys->view.shape[2] != h->head_dim)
        return fail(PyExc_ValueError, "the shapes of q, k, v and the cache don't match");
    if (out->view.shape[0] != h->n_tokens || out->view.shape[1] != h->n_heads * h->head_dim)
        return fail(PyExc_ValueError, "out must be [%ld, %ld]", h->n_tokens, h->n_heads * h->head_dim);
    if (h->n_tokens < 1 || h->pos < 0 || h->pos > h->n_ctx - h->n_tokens)
        return fail(PyExc_ValueError, "%ld tokens from position %ld on don't fit into a cache of %ld", h->n_tokens,
                    h->pos, h->n_ctx);
    if (h->window < 0 || h->window > h->n_ctx)
        return fail(PyExc_ValueError, "a window of %ld of %ld positions", h->window, h->n_ctx);
    if (h->head_dim < 1 || h->head_dim > MAX_HEAD_DIM || h->n_kv_heads < 1 || h->n_heads < 1 ||
        h->n_heads % h->n_kv_heads || h->n_heads / h->n_kv_heads > MAX_SHARED)
        return fail(PyExc_ValueError, "heads of width %ld, %ld to %ld, are not supported", h->head_dim, h->n_heads,
                    h->n_kv_heads);
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
    ARRAY q = INPUT("q", FLOAT32, 3), k = INPUT("k", FLOAT32, 3), v = INPUT("v", FLOAT32, 3);
    ARRAY keys = OUTPUT("keys", FLOAT16, 3), values = OUTPUT("values", FLOAT16, 3), out = OUTPUT("out", FLOAT32, 2);
    Py_ssize_t pos, window = 0;
    int threads, failed;
    if (!PyArg_ParseTuple(args, "O&O&O&O&O&nO&O&|n", parse_array, &q, parse_array, &k, parse_array, &v, parse_array,
                          &keys, parse_array, &values, &pos, parse_array, &out, parse_threads, &threads, &window))
        return NULL;
    const Py_ssize_t *shape = q.view.shape;
    heads h = {q.view.buf, keys.view.buf,   values.view.buf, out.view.buf,       shape[0],
               shape[1],   k.view.shape[1], shape[2],        keys.view.shape[1], pos,
               window};
    if (check_heads(&h, &k, &v, &keys, &values, &out)) return NULL;
    if (!window || window > pos + shape[0]) h.window = pos + shape[0];
    WITHOUT_GIL(failed, store_and_attend(&h, k.view.buf, v.view.buf, keys.view.buf, values.view.buf, threads));
    return result(failed);
}

/* from: [n_rows, n_cols] of numbers; out: as many bytes as they have in the other type. */
static int check_cast(const array *from, weight_type to, const array *out, const array *importance) {
    Py_ssize_t n_cols = from->view.shape[1], n_bytes = file_row_bytes(to, count(from));
    if (importance->view.obj && count(importance) != n_cols)
        return fail(PyExc_ValueError, "importance must be of %zd columns, not %zd", n_cols, count(importance));
    if (n_cols % types[to].block)
        return fail(PyExc_ValueError, "rows of blocks hold a multiple of %d weights, not %zd", types[to].block, n_cols);
    if (out->view.len != n_bytes || (uintptr_t)out->view.buf % sizeof(float))
        return fail(PyExc_ValueError, "out must be aligned and have %zd bytes", n_bytes);
    return 0;
}

static PyObject *py_cast(PyObject *module, PyObject *args) {
    (void)module;
    static const char *const formats[N_TYPES] = {[F32] = FLOAT32, [F16] = FLOAT16, [BF16] = "H"};
    weight_type type, to;
    PyObject *numbers;
    ARRAY x = INPUT("numbers", NULL, 2), out = OUTPUT("out", BYTES, 1), importance = INPUT("importance", FLOAT32, 1);
    int overflows;
    if (!PyArg_ParseTuple(args, "O&OO&O&|O&", parse_type, &type, &numbers, parse_type, &to, parse_array, &out,
                          parse_array, &importance))
        return NULL;
    if (!formats[type]) return result(fail(PyExc_ValueError, "numbers are f32, f16 or bf16, not %s", types[type].name));
    x.format = formats[type];
    if (!parse_array(numbers, &x) || check_cast(&x, to, &out, &importance)) return NULL;
    file_blocks from = {type, x.view.shape[0], x.view.shape[1], x.view.buf};
    const kernels *k = active_kernels(); /* another thread may choose others meanwhile */
    Py_BEGIN_ALLOW_THREADS;
    overflows = k->cast(&from, to, importance.view.obj ? importance.view.buf : NULL, out.view.buf);
    Py_END_ALLOW_THREADS;
    return result(overflows ? fail(PyExc_OverflowError, "NaN or numbers too large for %s", types[to].name) : 0);
}

/* What a product by a weight reads. Returns how many stretches that is. */
static long stretches_of(const weight *w, stretch *out) {
    if (w->data) *out = (stretch){w->data, weight_bytes(w)};
    for (long i = 0; !w->data && i < w->n_pieces; i++)
        out[i] = (stretch){w->pieces[i].blocks.data, (size_t)piece_bytes(&w->pieces[i])};
    return w->data ? 1 : w->n_pieces;
}

/* With the pool locked, so that no weight lets go of its pieces meanwhile. */
static uint64_t read_in_turn(Py_ssize_t n_weights, const weight *const *weights, stretch *all, int threads) {
    long n = 0;
    for (Py_ssize_t i = 0; i < n_weights; i++) n += stretches_of(weights[i], all + n);
    return read_all(n, all, threads);
}

static PyObject *read_weights(PyObject *tuple, int threads) {
    Py_ssize_t n_weights = PyTuple_Size(tuple);
    long n = 1;
    uint64_t sum;
    WeightObject *one;
    for (Py_ssize_t i = 0; i < n_weights; i++) {
        if (!parse_weight(PyTuple_GetItem(tuple, i), &one)) return NULL;
        n += 1 + one->w.n_pieces;
    }
    const weight **weights = calloc((size_t)n_weights + 1, sizeof *weights);
    stretch *all = calloc((size_t)n, sizeof *all);
    for (Py_ssize_t i = 0; weights && i < n_weights; i++) weights[i] = weight_of(PyTuple_GetItem(tuple, i));
    if (weights && all) WITHOUT_GIL(sum, read_in_turn(n_weights, weights, all, threads));
    PyObject *found = weights && all ? PyLong_FromUnsignedLongLong(sum) : PyErr_NoMemory();
    free(weights);
    free(all);
    return found;
}

static PyObject *py_read_all(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *object;
    ARRAY data = INPUT("data", BYTES, 1);
    int threads;
    uint64_t sum;
    if (!PyArg_ParseTuple(args, "OO&", &object, parse_threads, &threads)) return NULL;
    if (PyTuple_Check(object)) return read_weights(object, threads);
    if (!parse_array(object, &data)) return NULL;
    stretch all = {data.view.buf, (size_t)data.view.len};
    WITHOUT_GIL(sum, read_all(1, &all, threads));
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

static PyObject *py_types(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *all = PyDict_New();
    for (int i = 0; all && i < N_TYPES; i++) {
        PyObject *facts = Py_BuildValue("iis", types[i].block, types[i].bytes, types[types[i].prepared].name);
        if (!facts || PyDict_SetItemString(all, types[i].name, facts)) Py_CLEAR(all);
        Py_XDECREF(facts);
    }
    return all;
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
    return Py_BuildValue("z", amx_obstacle());
}

static PyObject *py_use_level(PyObject *module, PyObject *args) {
    (void)module;
    const char *name;
    int failed;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    WITHOUT_GIL(failed, use_level(name));
    return result(failed ? fail(PyExc_ValueError, "this computer has no level '%s'", name) : 0);
}

static PyMethodDef functions[] = {
    {"pack", py_pack, METH_VARARGS,
     "pack(file_type, data, n_rows, n_cols, weight, row, col, threads): put a file's blocks into a Weight"},
    {"settle", py_settle, METH_VARARGS,
     "settle(weight, threads): pack a mapped Weight into memory of its own; it lets go of its arrays"},
    {"matmul", py_matmul, METH_VARARGS, "matmul(x, weights, outs, threads): each out = x @ weight.T"},
    {"rows", py_rows, METH_VARARGS, "rows(weight, indices, out): rows of a weight as float32"},
    {"rms_norm", py_rms_norm, METH_VARARGS, "rms_norm(x, weight, eps, out, threads)"},
    {"swiglu", py_swiglu, METH_VARARGS, "swiglu(gate, up, out, threads)"},
    {"rope", py_rope, METH_VARARGS, "rope(x, freqs, out, threads)"},
    {"attention", py_attention, METH_VARARGS, "attention(q, k, v, keys, values, pos, out, threads, window=0)"},
    {"cast", py_cast, METH_VARARGS, "cast(type, numbers, to, out[, importance]): numbers as bytes of another type"},
    {"read_all", py_read_all, METH_VARARGS,
     "read_all(data, threads): the sum of the words of an array or of a tuple of Weights, as fast as memory allows"},
    {"multiply_all", py_multiply_all, METH_VARARGS,
     "multiply_all(rounds, threads): the number of products of registers it has done, as fast as the level can"},
    {"types", py_types, METH_NOARGS, "types(): {name: (weights of a block, its bytes, the type it is prepared as)}"},
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
    if (PyModule_AddIntMacro(module, STRIP) || PyModule_AddIntMacro(module, FEW)) return -1;
    return PyModule_AddObjectRef(module, "Weight", (PyObject *)weight_type_object);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Operations of a LLaMA in C; ext/README.md has the map.", 0, functions,
    slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
