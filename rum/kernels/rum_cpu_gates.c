/* One step of an LSTM and of a GRU, float32, all but their products; rum/kernels/gates_cpu.py calls
 * it, rum/kernels/gates.py is the mathematics in PyTorch. See rum_cpu.c for how it is built. */
#include "rum_cpu_rows.h"

#define LSTM_BUFFERS 11

typedef struct {
    int64_t batch, size;
    int32_t threads, has_norms;
    float forget_bias, zoneout_h, zoneout_c;
    const float *gate_gain, *gate_shift; /* [4N]: i, f, g, o; or null */
    const float *cell_gain, *cell_shift; /* [N] or null */
} LSTMOptions;

typedef struct {
    float *gates, *standard;                      /* [4N] */
    float *cell, *cell_standard, *squashed;       /* [N] */
    Normal normals[4], cell_normal;
} LSTMRow;

/* Up to (not including) zoneout: gates, cell state, and what of it is inside of the output */
INLINE void lstm_row(
    const LSTMOptions *o, const float *pre, const float *cell, float *scratch, LSTMRow *row)
{
    const int64_t n = o->size;
    row->gates = scratch;
    row->standard = scratch + 4 * n;
    row->cell = scratch + 8 * n;
    row->cell_standard = scratch + 9 * n;
    row->squashed = scratch + 10 * n;
    float *gates = row->gates, *new_cell = row->cell, *squashed = row->squashed;
    if (o->has_norms) {
        for (int k = 0; k < 4; k++) {
            float *standard = row->standard + k * n;
            row->normals[k] = moments(pre + k * n, n);
            standardize(pre + k * n, standard, n, row->normals[k]);
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                gates[k * n + i] = standard[i] * o->gate_gain[k * n + i] + o->gate_shift[k * n + i];
        }
    } else {
        memcpy(gates, pre, (size_t)(4 * n) * sizeof(float));
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        gates[i] = sigmoid(gates[i]);
        gates[n + i] = sigmoid(gates[n + i] + o->forget_bias);
        gates[2 * n + i] = hyperbolic_tangent(gates[2 * n + i]);
        gates[3 * n + i] = sigmoid(gates[3 * n + i]);
        new_cell[i] = gates[n + i] * cell[i] + gates[i] * gates[2 * n + i];
    }
    if (o->has_norms) {
        row->cell_normal = moments(new_cell, n);
        standardize(new_cell, row->cell_standard, n, row->cell_normal);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            squashed[i] =
                hyperbolic_tangent(row->cell_standard[i] * o->cell_gain[i] + o->cell_shift[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) squashed[i] = hyperbolic_tangent(new_cell[i]);
    }
}

CLONES void lstm_rows_forward(
    const LSTMOptions *o, int64_t first, int64_t last, const float *pre, const float *hidden,
    const float *cell, const float *mask_h, const float *mask_c, float *new_hidden,
    float *new_cell, float *scratch)
{
    const int64_t n = o->size;
    for (int64_t b = first; b < last; b++) {
        LSTMRow row = {0};
        lstm_row(o, pre + 4 * b * n, cell + b * n, scratch, &row);
        const float *gate = row.gates + 3 * n, *from_cell = row.cell, *squashed = row.squashed;
        const float *h = hidden + b * n, *c = cell + b * n;
        const float *kept_h = mask_h ? mask_h + b * n : 0, *kept_c = mask_c ? mask_c + b * n : 0;
        float *to_hidden = new_hidden + b * n, *to_cell = new_cell + b * n;
        const float zoneout_h = o->zoneout_h, zoneout_c = o->zoneout_c;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float new = gate[i] * squashed[i];
            to_hidden[i] = new + (kept_h ? kept_h[i] : zoneout_h) * (h[i] - new);
            to_cell[i] = from_cell[i] + (kept_c ? kept_c[i] : zoneout_c) * (c[i] - from_cell[i]);
        }
    }
}

/* grad_hidden and grad_cell are those of the new states, and afterwards of the states, without what
 * passes through pre; grad_norms is [10N], summed into */
CLONES void lstm_rows_backward(
    const LSTMOptions *o, int64_t first, int64_t last, const float *pre, const float *cell,
    const float *mask_h, const float *mask_c, float *grad_hidden, float *grad_cell,
    float *grad_pre, float *grad_norms, float *scratch)
{
    const int64_t n = o->size;
    for (int64_t b = first; b < last; b++) {
        LSTMRow row = {0};
        lstm_row(o, pre + 4 * b * n, cell + b * n, scratch, &row);
        const float *i_gate = row.gates, *f_gate = row.gates + n, *g_gate = row.gates + 2 * n;
        const float *o_gate = row.gates + 3 * n, *squashed = row.squashed, *c = cell + b * n;
        const float *kept_h = mask_h ? mask_h + b * n : 0, *kept_c = mask_c ? mask_c + b * n : 0;
        float *of_hidden = grad_hidden + b * n, *of_cell = grad_cell + b * n;
        float *of_pre = grad_pre + 4 * b * n, *inside = row.cell; /* no longer needed */
        const float zoneout_h = o->zoneout_h, zoneout_c = o->zoneout_c;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float kept = of_hidden[i] * (kept_h ? kept_h[i] : zoneout_h);
            const float grad = of_hidden[i] - kept;
            of_hidden[i] = kept;
            of_pre[3 * n + i] = grad * squashed[i] * o_gate[i] * (1.0f - o_gate[i]);
            inside[i] = grad * o_gate[i] * (1.0f - squashed[i] * squashed[i]);
        }
        if (o->has_norms)
            norm_backward(
                inside, row.cell_standard, o->cell_gain, grad_norms + 8 * n, grad_norms + 9 * n, n,
                row.cell_normal.inverse_std);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float kept = of_cell[i] * (kept_c ? kept_c[i] : zoneout_c);
            const float grad = of_cell[i] - kept + inside[i];
            of_cell[i] = kept + grad * f_gate[i];
            of_pre[i] = grad * g_gate[i] * i_gate[i] * (1.0f - i_gate[i]);
            of_pre[n + i] = grad * c[i] * f_gate[i] * (1.0f - f_gate[i]);
            of_pre[2 * n + i] = grad * i_gate[i] * (1.0f - g_gate[i] * g_gate[i]);
        }
        if (o->has_norms)
            for (int k = 0; k < 4; k++)
                norm_backward(
                    of_pre + k * n, row.standard + k * n, o->gate_gain + k * n,
                    grad_norms + k * n, grad_norms + (4 + k) * n, n, row.normals[k].inverse_std);
    }
}

/* pre is [B, 4N], states and masks [B, N]; scratch is LSTM_BUFFERS x N a thread */
void lstm_step_forward(
    const LSTMOptions *o, const float *pre, const float *hidden, const float *cell,
    const float *mask_h, const float *mask_c, float *new_hidden, float *new_cell, float *scratch)
{
#pragma omp parallel num_threads(o->batch * o->size < SMALL_STEP ? 1 : o->threads)
    lstm_rows_forward(
        o, o->batch * THREAD / THREADS, o->batch * (THREAD + 1) / THREADS, pre, hidden, cell,
        mask_h, mask_c, new_hidden, new_cell, scratch + THREAD * LSTM_BUFFERS * o->size);
}

/* grad_norms is 10 x N a thread */
void lstm_step_backward(
    const LSTMOptions *o, const float *pre, const float *cell, const float *mask_h,
    const float *mask_c, float *grad_hidden, float *grad_cell, float *grad_pre, float *grad_norms,
    float *scratch)
{
#pragma omp parallel num_threads(o->batch * o->size < SMALL_STEP ? 1 : o->threads)
    lstm_rows_backward(
        o, o->batch * THREAD / THREADS, o->batch * (THREAD + 1) / THREADS, pre, cell, mask_h,
        mask_c, grad_hidden, grad_cell, grad_pre, grad_norms + THREAD * 10 * o->size,
        scratch + THREAD * LSTM_BUFFERS * o->size);
}

CLONES void gru_rows_forward(
    int64_t first, int64_t last, int64_t n, const float *pre, const float *hidden,
    float *new_hidden)
{
    for (int64_t b = first; b < last; b++) {
        const float *row = pre + 4 * b * n, *h = hidden + b * n;
        float *new = new_hidden + b * n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float update = sigmoid(row[n + i]);
            const float candidate =
                hyperbolic_tangent(row[2 * n + i] + sigmoid(row[i]) * row[3 * n + i]);
            new[i] = candidate + update * (h[i] - candidate);
        }
    }
}

CLONES void gru_rows_backward(
    int64_t first, int64_t last, int64_t n, const float *pre, const float *hidden,
    float *grad_hidden, float *grad_pre)
{
    for (int64_t b = first; b < last; b++) {
        const float *row = pre + 4 * b * n, *h = hidden + b * n;
        float *of_hidden = grad_hidden + b * n, *of_pre = grad_pre + 4 * b * n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float reset = sigmoid(row[i]), update = sigmoid(row[n + i]);
            const float of_state = row[3 * n + i], grad = of_hidden[i];
            const float candidate = hyperbolic_tangent(row[2 * n + i] + reset * of_state);
            const float of_candidate = grad * (1.0f - update) * (1.0f - candidate * candidate);
            of_pre[i] = of_candidate * of_state * reset * (1.0f - reset);
            of_pre[n + i] = grad * (h[i] - candidate) * update * (1.0f - update);
            of_pre[2 * n + i] = of_candidate;
            of_pre[3 * n + i] = of_candidate * reset;
            of_hidden[i] = grad * update;
        }
    }
}

/* pre is [B, 4N]: reset gate, update gate, the input's share of the candidate and the state's */
void gru_step_forward(
    int64_t batch, int64_t n, int64_t threads, const float *pre, const float *hidden,
    float *new_hidden)
{
#pragma omp parallel num_threads(batch * n < SMALL_STEP ? 1 : (int)threads)
    gru_rows_forward(
        batch * THREAD / THREADS, batch * (THREAD + 1) / THREADS, n, pre, hidden, new_hidden);
}

void gru_step_backward(
    int64_t batch, int64_t n, int64_t threads, const float *pre, const float *hidden,
    float *grad_hidden, float *grad_pre)
{
#pragma omp parallel num_threads(batch * n < SMALL_STEP ? 1 : (int)threads)
    gru_rows_backward(
        batch * THREAD / THREADS, batch * (THREAD + 1) / THREADS, n, pre, hidden, grad_hidden,
        grad_pre);
}
