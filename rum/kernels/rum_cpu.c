/* The RUM recurrence with lambda = 0 or 1, float32, whole sequences. rum/kernels/cpu.py calls it;
 * rum/kernels/step.py is the mathematics of a step in PyTorch, with names explained there, and
 * rum/kernels/memory.py that of the associative memory.
 *
 * Samples do not meet: each thread takes some rows of the batch through all of time without
 * waiting for another. Only where rows are too few for that do threads share a step's product.
 *
 * Plain C without Python or torch headers. No -ffast-math: loading such a library would switch the
 * process to flush-to-zero. Sums are vectorised by `omp simd`; the instruction set is chosen when
 * the library is loaded, by features: the name of a processor would match its maker as well.
 */
#define _DEFAULT_SOURCE
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#include "rum_cpu_rows.h"

#define INTERFACE 4           /* grows when a signature below changes; cpu.py compares it */
#define FLOOR 1e-12f          /* squared norms below count as zero */
#define ROW_BUFFERS 14
#define SMALL (1 << 20)       /* multiplications below which threads cost more than they bring */
#define WIDTH 16              /* columns of a panel, see rum_cpu_product.h; cpu.py packs them */
#define DEPTH 512
#define FEW_ROWS 8            /* of the largest tile */

#if defined(__x86_64__)
#define NAME avx512
#define TARGET __attribute__((target("avx512f")))
#define VECTOR_BYTES 64
#define ROWS 8
#include "rum_cpu_product.h"
#define NAME avx2
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define ROWS 6
#include "rum_cpu_product.h"
#endif
#define NAME any
#define TARGET
#define VECTOR_BYTES 16
#define ROWS 2
#include "rum_cpu_product.h"

typedef void (*Multiply)(
    int64_t, int64_t, int64_t, int64_t, int64_t, const float *, int64_t, const float *, float *,
    int64_t);

static Multiply choose_multiply(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return multiply_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return multiply_avx2;
#endif
    return multiply_any;
}

enum { RELU, TANH, SIGMOID, SOFTSIGN };
enum { NO_NORM, POST_SIGMOID, PRE_SIGMOID };

int rum_interface(void) { return INTERFACE; }

/* K replicas have `batch` rows each; whatever is one a replica is an array. A row of
 * pre-activations is 3N wide: target, update gate, embedded input. */
typedef struct {
    int64_t replicas, batch, size;
    int32_t activation, gate_norm, has_eta, threads;
    const float *eta, *zoneout;            /* [K] */
    const float *gate_gain, *gate_shift;   /* [K, 2N], target then update gate; or null */
    const float *total_gain, *total_shift; /* [K, N] or null */
} Options;

/* The options of one replica, as if it were alone */
INLINE Options of_replica(const Options *all, int64_t k)
{
    Options one = *all;
    one.eta += k;
    one.zoneout += k;
    if (one.gate_norm) {
        one.gate_gain += 2 * k * one.size;
        one.gate_shift += 2 * k * one.size;
        one.total_gain += k * one.size;
        one.total_shift += k * one.size;
    }
    return one;
}

INLINE float activate(int32_t kind, float x)
{
    if (kind == RELU) return x <= 0.0f ? 0.0f : x; /* NaN goes through */
    if (kind == TANH) return hyperbolic_tangent(x);
    if (kind == SIGMOID) return sigmoid(x);
    return x / (1.0f + fabsf(x));
}

/* derivative from the activation's own value */
INLINE float slope(int32_t kind, float y)
{
    if (kind == RELU) return y <= 0.0f ? 0.0f : 1.0f;
    if (kind == TANH) return 1.0f - y * y;
    if (kind == SIGMOID) return y * (1.0f - y);
    float d = 1.0f - fabsf(y);
    return d * d;
}

typedef struct {
    float *target, *sigmoid, *update, *total, *candidate, *mixed; /* rows of scratch */
    float *r, *w, *vector, *on_r, *on_w, *skew_r, *skew_w, *grad_r; /* with a memory only */
    Normal target_normal, update_normal, total_normal;
    float e_norm, r_norm;    /* inverse norms of embedded input and target */
    float scale_w, scale_r;  /* of the two reflections, 0 where left out */
    float k, z, rw, square;
} Row;

/* The associative memory of one sample, N x N, and the skew gradient that it carries backward */
typedef struct { float *matrix, *skew; } Memory;

/* A line of a memory times r, w and a vector */
typedef struct { float r, w, vector; } Products;

INLINE Products line_products(const Row *row, const float *line, const float *vector, int64_t n)
{
    const float *r = row->r, *w = row->w;
    float on_r = 0.0f, on_w = 0.0f, on_vector = 0.0f;
#pragma omp simd reduction(+ : on_r, on_w, on_vector)
    for (int64_t j = 0; j < n; j++) {
        on_r += line[j] * r[j];
        on_w += line[j] * w[j];
        on_vector += line[j] * vector[j];
    }
    Products products = {on_r, on_w, on_vector};
    return products;
}

/* R <- R Rot; total = eps + R h, by the vector that is turned already */
INLINE void advance(const Row *row, float *matrix, const float *eps, int64_t n)
{
    const float *r = row->r, *w = row->w;
    for (int64_t i = 0; i < n; i++) {
        float *line = matrix + i * n;
        const Products on = line_products(row, line, row->vector, n);
        const float first = row->scale_r * on.r;
        const float second = row->scale_w * (on.w - row->rw * first);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) line[j] -= first * r[j] + second * w[j];
        row->total[i] = eps[i] + on.vector;
    }
}

/* The same total from the memory after the step, with R r and R w for `undo` */
INLINE void recall(const Row *row, const float *matrix, const float *eps, const float *h, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const Products on = line_products(row, matrix + i * n, h, n);
        row->on_r[i] = on.r;
        row->on_w[i] = on.w;
        row->total[i] = eps[i] + on.vector;
    }
}

INLINE float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Takes memory and skew gradient to the step before, given the gradient of R h. Adds those of h
 * and eps; writes that of the target. */
INLINE void undo(
    const Row *row, Memory memory, const float *eps, const float *h, const float *grad,
    float *grad_h, float *grad_eps, float *grad_target, int64_t n)
{
    const float *r = row->r, *w = row->w;
    const float scale_r = row->scale_r, scale_w = row->scale_w, rw = row->rw;
    float *z = row->vector, *skew_r = row->skew_r, *skew_w = row->skew_w, *grad_r = row->grad_r;
    memset(z, 0, (size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        float *line = memory.matrix + i * n;
        const float first = scale_w * row->on_w[i], of_line = grad[i];
        const float second = scale_r * (row->on_r[i] - rw * first);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            z[j] += of_line * line[j];
            line[j] -= first * w[j] + second * r[j];
        }
    }

    const float hw = dot(h, w, n), hr = dot(h, r, n), zw = dot(z, w, n), zr = dot(z, r, n);
    float wr_skew = 0.0f, we_skew = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        const float *line = memory.skew + i * n;
        float by_w = 0.0f, by_r = 0.0f;
#pragma omp simd reduction(+ : by_w, by_r)
        for (int64_t j = 0; j < n; j++) {
            by_w += line[j] * w[j];
            by_r += line[j] * r[j];
        }
        skew_w[i] = by_w + z[i] * hw - h[i] * zw;
        skew_r[i] = by_r + z[i] * hr - h[i] * zr;
        wr_skew += skew_w[i] * r[i];
        we_skew += w[i] * (skew_w[i] - skew_r[i]);
    }
    /* grad_w = -scale_w skew_w; `turned` = the skew gradient after H_w, applied to r */
    float *turned = row->on_r;
    float e_along = 0.0f, r_along = 0.0f;
#pragma omp simd reduction(+ : e_along, r_along)
    for (int64_t i = 0; i < n; i++) {
        const float grad_w = -scale_w * skew_w[i];
        grad_r[i] = grad_w + scale_r * (skew_w[i] - skew_r[i] - scale_w * we_skew * w[i]);
        turned[i] = skew_r[i] + scale_w * wr_skew * w[i] + grad_w * rw;
        e_along += grad_w * eps[i] * row->e_norm;
        r_along += grad_r[i] * r[i];
    }
    for (int64_t i = 0; i < n; i++) {
        float *line = memory.skew + i * n;
        const float z_i = z[i], h_i = h[i], w_i = scale_w * w[i], skew_i = scale_w * skew_w[i];
        const float r_i = scale_r * r[i], turned_i = scale_r * turned[i];
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            line[j] += (z_i * h[j] - h_i * z[j]) + (w_i * skew_w[j] - skew_i * w[j])
                + (r_i * turned[j] - turned_i * r[j]);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float grad_w = -scale_w * skew_w[i];
        grad_h[i] += z[i];
        grad_eps[i] += (grad_w - e_along * eps[i] * row->e_norm) * row->e_norm;
        grad_target[i] = (grad_r[i] - r_along * r[i]) * row->r_norm;
    }
}

/* all of a step up to (not including) time normalisation and zoneout; a memory with a skew gradient
 * is that after the step, one without is that before it and advances */
INLINE void row_forward(
    const Options *o, const float *pre, const float *eps, const float *h, Memory memory,
    float *scratch, Row *row)
{
    const int64_t n = o->size;
    row->target = scratch;
    row->sigmoid = scratch + n;
    row->update = scratch + 2 * n;
    row->total = scratch + 3 * n;
    row->candidate = scratch + 4 * n;
    row->mixed = scratch + 5 * n;
    row->r = scratch + 6 * n;
    row->w = scratch + 7 * n;
    row->vector = scratch + 8 * n;
    row->on_r = scratch + 9 * n;
    row->on_w = scratch + 10 * n;
    row->skew_r = scratch + 11 * n;
    row->skew_w = scratch + 12 * n;
    row->grad_r = scratch + 13 * n;
    float *target = row->target, *sig = row->sigmoid, *update = row->update;
    float *total = row->total, *candidate = row->candidate, *mixed = row->mixed;

    if (o->gate_norm == NO_NORM) {
        memcpy(target, pre, (size_t)n * sizeof(float));
#pragma omp simd
        for (int64_t i = 0; i < n; i++) update[i] = sig[i] = sigmoid(pre[n + i]);
    } else {
        row->target_normal = moments(pre, n);
        standardize(pre, target, n, row->target_normal);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            target[i] = target[i] * o->gate_gain[i] + o->gate_shift[i];
        const float *gain = o->gate_gain + n, *shift = o->gate_shift + n;
        if (o->gate_norm == PRE_SIGMOID) {
            row->update_normal = moments(pre + n, n);
            standardize(pre + n, update, n, row->update_normal);
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                update[i] = sig[i] = sigmoid(update[i] * gain[i] + shift[i]);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) sig[i] = sigmoid(pre[n + i]);
            row->update_normal = moments(sig, n);
            standardize(sig, update, n, row->update_normal);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) update[i] = update[i] * gain[i] + shift[i];
        }
    }

    float ee = 0.0f, tt = 0.0f;
#pragma omp simd reduction(+ : ee, tt)
    for (int64_t i = 0; i < n; i++) {
        ee += eps[i] * eps[i];
        tt += target[i] * target[i];
    }
    const int is_identity = ee < FLOOR || tt < FLOOR;
    const float e_norm = ee < FLOOR ? 1.0f : 1.0f / sqrtf(ee);
    const float r_norm = tt < FLOOR ? 1.0f : 1.0f / sqrtf(tt);
    float ww = 0.0f, wh = 0.0f, rh = 0.0f, rw = 0.0f;
#pragma omp simd reduction(+ : ww, wh, rh, rw)
    for (int64_t i = 0; i < n; i++) {
        const float r = target[i] * r_norm, w = eps[i] * e_norm + r;
        ww += w * w;
        wh += w * h[i];
        rh += r * h[i];
        rw += r * w;
    }
    const float scale_w = is_identity || ww < FLOOR ? 0.0f : 2.0f / ww;
    const float scale_r = is_identity ? 0.0f : 2.0f;
    const float k = scale_w * wh, z = rh - k * rw;
    row->e_norm = e_norm;
    row->r_norm = r_norm;
    row->scale_w = scale_w;
    row->scale_r = scale_r;
    row->k = k;
    row->z = z;
    row->rw = rw;
    if (memory.matrix) {
        float *to_r = row->r, *to_w = row->w, *vector = row->vector;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            to_r[i] = target[i] * r_norm;
            to_w[i] = eps[i] * e_norm + to_r[i];
            vector[i] = h[i] - k * to_w[i] - scale_r * z * to_r[i];
        }
        if (memory.skew)
            recall(row, memory.matrix, eps, h, n);
        else
            advance(row, memory.matrix, eps, n);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float r = target[i] * r_norm, w = eps[i] * e_norm + r;
            total[i] = eps[i] + h[i] - k * w - scale_r * z * r;
        }
    }
    if (o->gate_norm == NO_NORM) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) candidate[i] = activate(o->activation, total[i]);
    } else {
        row->total_normal = moments(total, n);
        standardize(total, total, n, row->total_normal);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            candidate[i] =
                activate(o->activation, total[i] * o->total_gain[i] + o->total_shift[i]);
    }
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) {
        mixed[i] = candidate[i] + update[i] * (h[i] - candidate[i]);
        square += mixed[i] * mixed[i];
    }
    row->square = square;
}

/* Rows `first` to `last`, of one replica */
CLONES void rum_rows_forward(
    const Options *all, int64_t first, int64_t last, const float *pre, const float *h,
    const float *mask, float *matrices, float *out, float *scratch)
{
    if (first == last) return;
    const Options replica = of_replica(all, first / all->batch), *o = &replica;
    const int64_t n = o->size;
    for (int64_t b = first; b < last; b++) {
        Row row = {0};
        const float *previous = h + b * n;
        const Memory memory = {matrices ? matrices + b * n * n : 0, 0};
        const float *gates = pre + 3 * b * n;
        row_forward(o, gates, gates + 2 * n, previous, memory, scratch, &row);
        const float square = row.square < FLOOR ? FLOOR : row.square;
        const float scale = o->has_eta ? *o->eta / sqrtf(square) : 1.0f;
        const float *mixed = row.mixed, *kept = mask ? mask + b * n : 0;
        float *result = out + b * n;
        if (kept) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                const float new = scale * mixed[i];
                result[i] = new + kept[i] * (previous[i] - new);
            }
        } else {
            const float zoneout = *o->zoneout;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                const float new = scale * mixed[i];
                result[i] = new + zoneout * (previous[i] - new);
            }
        }
    }
}

/* Rows `first` to `last`, of one replica. grad_state holds the gradient that later steps gave this step's state, and afterwards that of
 * the previous state without its share through `pre`; grad_norms is [6N], summed into */
CLONES void rum_rows_backward(
    const Options *all, int64_t first, int64_t last, const float *pre, const float *h,
    const float *mask, const float *grad_out, float *matrices, float *skews, float *grad_state,
    float *grad_pre, float *grad_norms, float *scratch)
{
    if (first == last) return;
    const int64_t k = first / all->batch, n = all->size;
    const Options replica = of_replica(all, k), *o = &replica;
    grad_norms += 6 * k * n;
    for (int64_t b = first; b < last; b++) {
        Row row = {0};
        const float *previous = h + b * n, *gates = pre + 3 * b * n, *embedded = gates + 2 * n;
        const Memory memory = {
            matrices ? matrices + b * n * n : 0, skews ? skews + b * n * n : 0};
        row_forward(o, gates, embedded, previous, memory, scratch, &row);
        const float *kept = mask ? mask + b * n : 0, *from_out = grad_out + b * n;
        const float *mixed = row.mixed, *candidate = row.candidate, *update = row.update;
        const float *target = row.target, *total = row.total, *sig = row.sigmoid;
        float *state = grad_state + b * n, *of_target = grad_pre + 3 * b * n;
        float *of_update = of_target + n, *grad = of_target + 2 * n;

        /* zoneout and time normalisation */
        const float square = row.square < FLOOR ? FLOOR : row.square;
        const float scale = o->has_eta ? *o->eta / sqrtf(square) : 1.0f;
        const float zoneout = *o->zoneout;
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < n; i++) {
            const float all = from_out[i] + state[i];
            const float keep = all * (kept ? kept[i] : zoneout);
            state[i] = keep;
            grad[i] = all - keep;
            along += mixed[i] * grad[i];
        }
        along = !o->has_eta || row.square < FLOOR ? 0.0f : along / square;
        /* the mix of candidate and previous state */
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float g = scale * (grad[i] - along * mixed[i]);
            of_update[i] = g * (previous[i] - candidate[i]);
            state[i] += g * update[i];
            grad[i] = (g - g * update[i]) * slope(o->activation, candidate[i]);
        }
        if (o->gate_norm != NO_NORM)
            norm_backward(
                grad, total, o->total_gain, grad_norms + 4 * n, grad_norms + 5 * n, n,
                row.total_normal.inverse_std);

        /* the rotation: two reflections, or those of the memory */
        if (memory.matrix) {
            memcpy(row.total, grad, (size_t)n * sizeof(float)); /* of eps is added to grad */
            undo(&row, memory, embedded, previous, row.total, state, grad, of_target, n);
        } else {
            const float e_norm = row.e_norm, r_norm = row.r_norm, k = row.k, z = row.z;
            const float scale_r = row.scale_r;
            float rg = 0.0f, wg = 0.0f;
#pragma omp simd reduction(+ : rg, wg)
            for (int64_t i = 0; i < n; i++) {
                const float r = target[i] * r_norm, w = embedded[i] * e_norm + r;
                rg += r * grad[i];
                wg += w * grad[i];
            }
            const float s = row.scale_w * (wg - scale_r * rg * row.rw);
            float we = 0.0f, tr = 0.0f;
#pragma omp simd reduction(+ : we, tr)
            for (int64_t i = 0; i < n; i++) {
                const float e = embedded[i] * e_norm, r = target[i] * r_norm, w = e + r;
                const float reflected = grad[i] - scale_r * rg * r;
                const float of_w = s * k * w - s * previous[i] - k * reflected;
                const float of_r = of_w - scale_r * (z * grad[i] + rg * (previous[i] - k * w));
                we += of_w * e;
                tr += of_r * r;
            }
            const int is_identity = scale_r == 0.0f;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                const float e = embedded[i] * e_norm, r = target[i] * r_norm, w = e + r;
                const float reflected = grad[i] - scale_r * rg * r;
                const float of_w = s * k * w - s * previous[i] - k * reflected;
                const float of_r = of_w - scale_r * (z * grad[i] + rg * (previous[i] - k * w));
                state[i] += reflected - s * w;
                of_target[i] = is_identity ? 0.0f : (of_r - tr * r) * r_norm;
                grad[i] += is_identity ? 0.0f : (of_w - we * e) * e_norm;
            }
        }

        /* the gates */
        if (o->gate_norm != POST_SIGMOID) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) of_update[i] *= sig[i] * (1.0f - sig[i]);
        }
        if (o->gate_norm != NO_NORM) {
            float *standard = row.mixed; /* no longer needed */
            standardize(gates, standard, n, row.target_normal);
            norm_backward(
                of_target, standard, o->gate_gain, grad_norms, grad_norms + 2 * n, n,
                row.target_normal.inverse_std);
            const float *source = o->gate_norm == PRE_SIGMOID ? gates + n : sig;
            standardize(source, standard, n, row.update_normal);
            norm_backward(
                of_update, standard, o->gate_gain + n, grad_norms + n, grad_norms + 3 * n, n,
                row.update_normal.inverse_std);
        }
        if (o->gate_norm == POST_SIGMOID) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) of_update[i] *= sig[i] * (1.0f - sig[i]);
        }
    }
}

/* A thread is a member of a group. The group has rows `first` to `last` of the batch; of their
 * product with a weight, the member has panels `first_panel` to `last_panel`. */
typedef struct {
    int64_t member, members, first, last, first_panel, last_panel;
} Share;

/* Rows that a group takes through time together, and of them the member's own */
typedef struct {
    int64_t first, last, own_first, own_last;
} Rows;

static int num_threads(const Options *o, int64_t steps)
{
    const int64_t rows = o->replicas * o->batch;
    return rows * o->size * o->size * steps < SMALL ? 1 : o->threads;
}

static Share share(const Options *o, int64_t thread, int64_t threads, int64_t panels)
{
    const int64_t rows = o->replicas * o->batch, tiles = (rows + FEW_ROWS - 1) / FEW_ROWS;
    int64_t groups = threads < rows ? threads : rows, members = 1;
    if (groups > tiles && o->size >= 512 && o->replicas == 1) {
        groups = tiles; /* many weights for a row or two: share them instead */
        members = threads / groups;
    }
    const int64_t group = thread / members, member = thread % members;
    Share mine = {.member = member, .members = members};
    if (group >= groups) return mine; /* no rows, but it waits with the others */
    mine.first = rows * group / groups;
    mine.last = rows * (group + 1) / groups;
    mine.first_panel = panels * member / members;
    mine.last_panel = panels * (member + 1) / members;
    return mine;
}

/* Rows of one replica; with memories a few at a time, so that these stay in the cache */
static Rows rows_from(int64_t first, const Share *my, const Options *o, int has_memories)
{
    int64_t last = my->last;
    const int64_t end_of_replica = (first / o->batch + 1) * o->batch;
    if (last > end_of_replica) last = end_of_replica;
    if (has_memories && last - first > FEW_ROWS) last = first + FEW_ROWS;
    const int64_t count = last - first;
    Rows rows = {
        first, last, first + count * my->member / my->members,
        first + count * (my->member + 1) / my->members};
    return rows;
}

#define WAIT_FOR_MEMBERS        \
    if (my.members > 1) {       \
        _Pragma("omp barrier")  \
    }

/* Asks for large pages in memory that is not touched yet: taking it in small ones costs as much as
 * the products that fill it. */
void rum_use_large_pages(char *memory, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, begin = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) & ~(page - 1);
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* out [T, K, B, columns] = bias [K, columns] + input [T, K, B, depth] weights; panels are those of
 * the weights (K, columns, depth). */
void rum_project(
    const Options *o, int64_t steps, int64_t depth, int64_t columns, const float *panels,
    const float *bias, const float *input, float *out)
{
    const int64_t num_panels = (columns + WIDTH - 1) / WIDTH;
    const Multiply multiply = choose_multiply();
    const int64_t work = steps * o->replicas * o->batch * depth * columns;
#pragma omp parallel for num_threads(work < SMALL ? 1 : o->threads)
    for (int64_t block = 0; block < steps * o->replicas; block++) {
        const int64_t k = block % o->replicas;
        const float *rows = input + block * o->batch * depth;
        float *result = out + block * o->batch * columns;
        for (int64_t b = 0; b < o->batch; b++)
            memcpy(result + b * columns, bias + k * columns, (size_t)columns * sizeof(float));
        multiply(
            o->batch, depth, columns, 0, num_panels, rows, depth,
            panels + k * num_panels * WIDTH * depth, result, columns);
    }
}

/* out [R, columns] += rows [R, depth] weight', with strides; panels are those of the weight. Threads
 * take panels: at a step a weight is more than the rows. */
void rum_add_product(
    int64_t rows, int64_t depth, int64_t columns, int64_t threads, const float *panels,
    const float *input, int64_t stride_input, float *out, int64_t stride_out)
{
    const int64_t num_panels = (columns + WIDTH - 1) / WIDTH;
    const Multiply multiply = choose_multiply();
#pragma omp parallel num_threads(rows * depth * columns < SMALL ? 1 : (int)threads)
    multiply(
        rows, depth, columns, num_panels * THREAD / THREADS, num_panels * (THREAD + 1) / THREADS,
        input, stride_input, panels, out, stride_out);
}

/* The sequence functions, for at least one row. Rows of all replicas stand below each other: R = K x batch. hidden [R, N]
 * is the initial state; panels those of the weights (K, 2N, N); pre [T, R, 3N] begins as the share
 * of the inputs and ends with that of the state added to target and update gate; scratch is
 * ROW_BUFFERS x N a thread; mask and outputs are [T, R, N]. With lambda = 1 matrices [R, N, N] are
 * the memories, which advance; else null. */
void rum_forward(
    const Options *o, int64_t steps, const float *panels, const float *hidden, const float *mask,
    float *pre, float *matrices, float *outputs, float *scratch)
{
    const int64_t n = o->size, state = o->replicas * o->batch * n;
    const int64_t num_panels = (2 * n + WIDTH - 1) / WIDTH;
    const Multiply multiply = choose_multiply();
#pragma omp parallel num_threads(num_threads(o, steps))
    {
        const Share my = share(o, THREAD, THREADS, num_panels);
        float *buffers = scratch + THREAD * ROW_BUFFERS * n;
        int64_t first = my.first;
        do { /* once without rows too: others may wait for this thread */
            const Rows rows = rows_from(first, &my, o, matrices != 0);
            const float *weight = panels + first / o->batch * num_panels * WIDTH * n;
            const float *h = hidden;
            for (int64_t t = 0; t < steps; t++) {
                float *gates = pre + 3 * t * state, *out = outputs + t * state;
                multiply(
                    rows.last - rows.first, n, 2 * n, my.first_panel, my.last_panel,
                    h + rows.first * n, n, weight, gates + 3 * rows.first * n, 3 * n);
                WAIT_FOR_MEMBERS
                rum_rows_forward(
                    o, rows.own_first, rows.own_last, gates, h, mask ? mask + t * state : 0,
                    matrices, out, buffers);
                WAIT_FOR_MEMBERS
                h = out;
            }
            first = rows.last;
        } while (first < my.last);
    }
}

/* panels are those of the transposed weights (K, N, 2N); grad_state [R, N] is the gradient of the
 * last state on entry, apart from grad_outputs, and that of the initial state on return; grad_pre
 * is as pre; grad_norms, [K, 6N] a thread, is summed into. Memories go back to those before the
 * sequence; skews [R, N, N] are their gradients, in the same way; null with lambda = 0. */
void rum_backward(
    const Options *o, int64_t steps, const float *panels, const float *pre, const float *hidden,
    const float *outputs, const float *mask, const float *grad_outputs, float *matrices,
    float *skews, float *grad_state, float *grad_pre, float *grad_norms, float *scratch)
{
    const int64_t n = o->size, state = o->replicas * o->batch * n;
    const int64_t num_panels = (n + WIDTH - 1) / WIDTH;
    const Multiply multiply = choose_multiply();
#pragma omp parallel num_threads(num_threads(o, steps))
    {
        const Share my = share(o, THREAD, THREADS, num_panels);
        float *buffers = scratch + THREAD * ROW_BUFFERS * n;
        float *norms = grad_norms + THREAD * 6 * o->replicas * n;
        int64_t first = my.first;
        do { /* once without rows too: others may wait for this thread */
            const Rows rows = rows_from(first, &my, o, matrices != 0);
            const float *weight = panels + first / o->batch * num_panels * WIDTH * 2 * n;
            for (int64_t t = steps - 1; t >= 0; t--) {
                float *grad_gates = grad_pre + 3 * t * state;
                rum_rows_backward(
                    o, rows.own_first, rows.own_last, pre + 3 * t * state,
                    t ? outputs + (t - 1) * state : hidden, mask ? mask + t * state : 0,
                    grad_outputs + t * state, matrices, skews, grad_state, grad_gates, norms,
                    buffers);
                WAIT_FOR_MEMBERS
                multiply(
                    rows.last - rows.first, 2 * n, n, my.first_panel, my.last_panel,
                    grad_gates + 3 * rows.first * n, 3 * n, weight, grad_state + rows.first * n, n);
                WAIT_FOR_MEMBERS
            }
            first = rows.last;
        } while (first < my.last);
    }
}

/* One step of the rows, without products, for networks of several cells: as above with T = 1 and
 * one replica. */
void rum_step_forward(
    const Options *o, const float *pre, const float *hidden, const float *mask, float *out,
    float *scratch)
{
#pragma omp parallel num_threads(o->batch * o->size < SMALL_STEP ? 1 : o->threads)
    {
        const int64_t first = o->batch * THREAD / THREADS, last = o->batch * (THREAD + 1) / THREADS;
        rum_rows_forward(
            o, first, last, pre, hidden, mask, 0, out, scratch + THREAD * ROW_BUFFERS * o->size);
    }
}

void rum_step_backward(
    const Options *o, const float *pre, const float *hidden, const float *mask,
    const float *grad_outputs, float *grad_state, float *grad_pre, float *grad_norms,
    float *scratch)
{
#pragma omp parallel num_threads(o->batch * o->size < SMALL_STEP ? 1 : o->threads)
    {
        const int64_t first = o->batch * THREAD / THREADS, last = o->batch * (THREAD + 1) / THREADS;
        rum_rows_backward(
            o, first, last, pre, hidden, mask, grad_outputs, 0, 0, grad_state, grad_pre,
            grad_norms + THREAD * 6 * o->size, scratch + THREAD * ROW_BUFFERS * o->size);
    }
}
