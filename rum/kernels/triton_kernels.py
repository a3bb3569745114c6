"""Triton's kernels of a RUM, and the mathematics of rows that those of other cells share.

`rum.kernels.step` and `rum.kernels.memory` have the mathematics and explain the names. Backward
recomputes a step from its pre-activations. Sums are taken in a fixed order: no atomics.
"""

from typing import Any

import triton
import triton.language as tl

from rum.functional import SQUARED_NORM_FLOOR
from rum.kernels.step import LAYER_NORM_EPS

_FLOOR = tl.constexpr(SQUARED_NORM_FLOOR)
_LAYER_NORM_EPS = tl.constexpr(LAYER_NORM_EPS)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_STEP_NUMBERS = ("step", "steps", "batch")  # change from call to call: one binary for all values


# Mathematics of rows, on tiles [ROWS, BLOCK_N] that are zero outside of `valid`.


@triton.jit
def dot(a, b):
    """Row dot products, [ROWS, 1]."""
    return tl.sum(a * b, 1, keep_dims=True)


@triton.jit
def sigmoid(x):
    """Without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def tanh(x):
    """Without overflow."""
    small = tl.exp(-2.0 * tl.abs(x))
    value = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -value, value)


@triton.jit
def standardize(x, valid, size):
    """Rows at mean zero and variance one, and their inverse standard deviation."""
    centred = tl.where(valid, x - tl.sum(x, 1, keep_dims=True) / size, 0.0)
    inverse_std = tl.rsqrt(dot(centred, centred) / size + _LAYER_NORM_EPS)
    return centred * inverse_std, inverse_std


@triton.jit
def standardize_backward(grad, standard, inverse_std, valid, size):
    """Gradient of the rows from that of their standard form."""
    mean = tl.sum(grad, 1, keep_dims=True) / size
    along = dot(grad, standard) / size
    return tl.where(valid, (grad - mean - standard * along) * inverse_std, 0.0)


@triton.jit
def add_to(pointer, value, inside):
    """Adds to memory that no other program writes."""
    tl.store(pointer, tl.load(pointer, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        value = tl.where(x <= 0, 0.0, x)  # NaN goes through
    elif ACTIVATION == "tanh":
        value = tanh(x)
    elif ACTIVATION == "sigmoid":
        value = sigmoid(x)
    else:
        value = x / (1.0 + tl.abs(x))
    return value


@triton.jit
def _slope(value, ACTIVATION: tl.constexpr):
    """Derivative of the activation from its value."""
    if ACTIVATION == "relu":
        slope = tl.where(value <= 0, 0.0, 1.0)
    elif ACTIVATION == "tanh":
        slope = 1.0 - value * value
    elif ACTIVATION == "sigmoid":
        slope = value * (1.0 - value)
    else:
        slope = (1.0 - tl.abs(value)) * (1.0 - tl.abs(value))
    return slope


@triton.jit
def _load_norms(gate_gain, gate_shift, gain, shift, replica, columns, size):
    """Gains of target, update gate and total, then their shifts; [1, BLOCK_N]."""
    inside = columns < size
    if gain is None:
        nothing = tl.zeros_like(columns)
        norms = (nothing, nothing, nothing, nothing, nothing, nothing)
    else:
        of_gates = replica * 2 * size + columns
        of_total = replica * size + columns
        norms = (
            tl.load(gate_gain + of_gates, mask=inside, other=0.0),
            tl.load(gate_gain + size + of_gates, mask=inside, other=0.0),
            tl.load(gain + of_total, mask=inside, other=0.0),
            tl.load(gate_shift + of_gates, mask=inside, other=0.0),
            tl.load(gate_shift + size + of_gates, mask=inside, other=0.0),
            tl.load(shift + of_total, mask=inside, other=0.0),
        )
    return norms


@triton.jit
def _gates(target, update, norms, valid, size, GATE_NORM: tl.constexpr):
    """Target and update gate, and what their gradients need."""
    of_target, of_update = (target, target), (update, update)
    if GATE_NORM is not None:
        of_target = standardize(target, valid, size)
        target = of_target[0] * norms[0] + norms[3]
    if GATE_NORM == "pre_sigmoid":
        of_update = standardize(update, valid, size)
        update = of_update[0] * norms[1] + norms[4]
    gate = tl.where(valid, sigmoid(update), 0.0)
    update = gate
    if GATE_NORM == "post_sigmoid":
        of_update = standardize(gate, valid, size)
        update = of_update[0] * norms[1] + norms[4]
    return target, update, gate, of_target, of_update


@triton.jit
def _gates_backward(
    grad_target,
    grad_update,
    gate,
    of_target,
    of_update,
    norms,
    valid,
    size,
    GATE_NORM: tl.constexpr,
):
    """Gradients of both pre-activations, then those after gain and shift."""
    slope = gate * (1.0 - gate)
    if GATE_NORM != "post_sigmoid":
        grad_update = grad_update * slope
    scaled_target, scaled_update = grad_target, grad_update
    if GATE_NORM is not None:
        grad_target = standardize_backward(
            grad_target * norms[0], of_target[0], of_target[1], valid, size
        )
        grad_update = standardize_backward(
            grad_update * norms[1], of_update[0], of_update[1], valid, size
        )
    if GATE_NORM == "post_sigmoid":
        grad_update = grad_update * slope
    return grad_target, grad_update, scaled_target, scaled_update


@triton.jit
def _plane(source, target):
    """The two reflections of a rotation; scales are 0 where one is left out."""
    source_square, target_square = dot(source, source), dot(target, target)
    source_is_zero, target_is_zero = source_square < _FLOOR, target_square < _FLOOR
    is_identity = source_is_zero | target_is_zero
    e_inverse_norm = tl.rsqrt(tl.where(source_is_zero, 1.0, source_square))
    r_inverse_norm = tl.rsqrt(tl.where(target_is_zero, 1.0, target_square))
    e, r = source * e_inverse_norm, target * r_inverse_norm
    w = e + r
    square = dot(w, w)
    is_left_out = is_identity | (square < _FLOOR)
    scale_w = tl.where(is_left_out, 0.0, 2.0 / tl.where(is_left_out, 1.0, square))
    scale_r = tl.where(is_identity, 0.0, 2.0)
    return e, r, w, scale_r, scale_w, e_inverse_norm, r_inverse_norm


@triton.jit
def _turn(plane, vector):
    """The turned vector, and the scalars of its gradient."""
    r, w, scale_r, scale_w = plane[1], plane[2], plane[3], plane[4]
    k = scale_w * dot(w, vector)
    reflected = vector - k * w
    z = dot(r, reflected)
    return reflected - scale_r * z * r, k, z


@triton.jit
def _turn_backward(plane, k, z, vector, grad):
    """Gradients of source, target and vector."""
    e, r, w, scale_r, scale_w = plane[0], plane[1], plane[2], plane[3], plane[4]
    grad_dot_r = dot(r, grad)
    grad_reflected = grad - scale_r * grad_dot_r * r
    s = scale_w * dot(w, grad_reflected)
    grad_w = s * k * w - s * vector - k * grad_reflected
    grad_r = grad_w - scale_r * (z * grad + grad_dot_r * (vector - k * w))
    grad_source = (grad_w - dot(grad_w, e) * e) * plane[5]
    grad_target = (grad_r - dot(grad_r, r) * r) * plane[6]
    return grad_source, grad_target, grad_reflected - s * w


@triton.jit
def _mix(
    total, hidden, update, norms, valid, size, ACTIVATION: tl.constexpr, GATE_NORM: tl.constexpr
):
    """The mix of candidate and state, the candidate, and the standard form of the total."""
    of_total = (total, total)
    if GATE_NORM is not None:
        of_total = standardize(total, valid, size)
        total = of_total[0] * norms[2] + norms[5]
    candidate = tl.where(valid, _activate(total, ACTIVATION), 0.0)
    return candidate + update * (hidden - candidate), candidate, of_total


@triton.jit
def _mix_backward(
    grad,
    hidden,
    update,
    candidate,
    of_total,
    norms,
    valid,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
):
    """Gradients of total, update gate and state, then that of the total after gain and shift."""
    grad_update = grad * (hidden - candidate)
    grad_hidden = grad * update
    scaled = (grad - grad_hidden) * _slope(candidate, ACTIVATION)
    grad_total = scaled
    if GATE_NORM is not None:
        grad_total = standardize_backward(scaled * norms[2], of_total[0], of_total[1], valid, size)
    return grad_total, grad_update, grad_hidden, scaled


@triton.jit
def _new_state(mixed, hidden, keep, eta, HAS_ETA: tl.constexpr):
    """Time normalisation and zoneout."""
    if HAS_ETA:
        square = dot(mixed, mixed)
        mixed = mixed * (eta * tl.rsqrt(tl.where(square < _FLOOR, _FLOOR, square)))
    return keep * hidden + (1.0 - keep) * mixed


@triton.jit
def _new_state_backward(grad, mixed, keep, eta, HAS_ETA: tl.constexpr):
    """Gradients of the mix and of the state."""
    grad_hidden = grad * keep
    grad = grad - grad_hidden
    if HAS_ETA:
        square = dot(mixed, mixed)
        is_floored = square < _FLOOR
        square = tl.where(is_floored, _FLOOR, square)
        along = tl.where(is_floored, 0.0, dot(mixed, grad) / square)
        grad = eta * tl.rsqrt(square) * (grad - along * mixed)
    return grad, grad_hidden


@triton.jit
def _step(
    target,
    update,
    embedded,
    hidden,
    keep,
    eta,
    norms,
    valid,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
    HAS_ETA: tl.constexpr,
):
    """The state after a step with lambda = 0, from pre-activations of target and update gate."""
    target, update, _, _, _ = _gates(target, update, norms, valid, size, GATE_NORM)
    turned, _, _ = _turn(_plane(embedded, target), hidden)
    mixed, _, _ = _mix(
        embedded + turned, hidden, update, norms, valid, size, ACTIVATION, GATE_NORM
    )
    return _new_state(mixed, hidden, keep, eta, HAS_ETA)


@triton.jit
def _step_backward(
    target,
    update,
    embedded,
    hidden,
    keep,
    eta,
    grad,
    norms,
    valid,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
    HAS_ETA: tl.constexpr,
):
    """Gradients of a step with lambda = 0 from that of the state after it.

    Returns:
        Those of target, update gate, embedded input and state (without what passes through the
        pre-activations); then those of gains and shifts, row by row, in the order of `norms`.
    """
    target, update, gate, of_target, of_update = _gates(
        target, update, norms, valid, size, GATE_NORM
    )
    plane = _plane(embedded, target)
    turned, k, z = _turn(plane, hidden)
    mixed, candidate, of_total = _mix(
        embedded + turned, hidden, update, norms, valid, size, ACTIVATION, GATE_NORM
    )
    grad, kept = _new_state_backward(grad, mixed, keep, eta, HAS_ETA)
    grad_total, grad_update, grad_hidden, scaled = _mix_backward(
        grad, hidden, update, candidate, of_total, norms, valid, size, ACTIVATION, GATE_NORM
    )
    grad_source, grad_target, grad_vector = _turn_backward(plane, k, z, hidden, grad_total)
    grad_target, grad_update, scaled_target, scaled_update = _gates_backward(
        grad_target, grad_update, gate, of_target, of_update, norms, valid, size, GATE_NORM
    )
    grad_norms = (
        scaled_target * of_target[0],
        scaled_update * of_update[0],
        scaled * of_total[0],
        scaled_target,
        scaled_update,
        scaled,
    )
    return (
        grad_target,
        grad_update,
        grad_total + grad_source,
        kept + grad_hidden + grad_vector,
        grad_norms,
    )


# One step with lambda = 0, a program per row.


@triton.jit(do_not_specialize=_STEP_NUMBERS)
def rows_forward(
    pre,
    hidden,
    mask,
    gate_gain,
    gate_shift,
    gain,
    shift,
    scalars,
    outputs,
    operand,
    step,
    batch,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
    HAS_ETA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Step `step` of a sequence; `operand` gets the state in the dtype of the next product."""
    rows = tl.num_programs(0)
    in_step = tl.program_id(0).to(tl.int64)
    row = step.to(tl.int64) * rows + in_step
    replica = in_step // batch
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = columns < size
    norms = _load_norms(gate_gain, gate_shift, gain, shift, replica, columns, size)
    eta = tl.load(scalars + 2 * replica)
    keep = tl.load(scalars + 2 * replica + 1)
    if mask is not None:
        keep = tl.load(mask + row * size + columns, mask=valid, other=0.0)
    if step > 0:
        state = tl.load(outputs + (row - rows) * size + columns, mask=valid, other=0.0)
    else:
        state = tl.load(hidden + row * size + columns, mask=valid, other=0.0)
    pre += row * 3 * size + columns
    new = _step(
        tl.load(pre, mask=valid, other=0.0),
        tl.load(pre + size, mask=valid, other=0.0),
        tl.load(pre + 2 * size, mask=valid, other=0.0),
        state,
        keep,
        eta,
        norms,
        valid,
        size,
        ACTIVATION,
        GATE_NORM,
        HAS_ETA,
    )
    tl.store(outputs + row * size + columns, new, mask=valid)
    if operand is not None:
        tl.store(operand + in_step * size + columns, new.to(operand.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=_STEP_NUMBERS)
def rows_backward(
    pre,
    hidden,
    mask,
    gate_gain,
    gate_shift,
    gain,
    shift,
    scalars,
    outputs,
    grad_outputs,
    grad_state,
    grad_pre,
    grad_norms,
    operand,
    step,
    batch,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
    HAS_ETA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Back by step `step`; adds each row's gradients of the layer norms to `[rows, 6N]`.

    `operand` gets the gradients of target and update gate in the dtype of the next product.
    """
    rows = tl.num_programs(0)
    in_step = tl.program_id(0).to(tl.int64)
    row = step.to(tl.int64) * rows + in_step
    replica = in_step // batch
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = columns < size
    norms = _load_norms(gate_gain, gate_shift, gain, shift, replica, columns, size)
    eta = tl.load(scalars + 2 * replica)
    keep = tl.load(scalars + 2 * replica + 1)
    if mask is not None:
        keep = tl.load(mask + row * size + columns, mask=valid, other=0.0)
    if step > 0:
        state = tl.load(outputs + (row - rows) * size + columns, mask=valid, other=0.0)
    else:
        state = tl.load(hidden + row * size + columns, mask=valid, other=0.0)
    grad_state += in_step * size + columns
    grad = tl.load(grad_state, mask=valid, other=0.0)
    if grad_outputs is not None:
        grad += tl.load(grad_outputs + row * size + columns, mask=valid, other=0.0)
    pre += row * 3 * size + columns
    grad_target, grad_update, grad_embedded, grad_hidden, of_norms = _step_backward(
        tl.load(pre, mask=valid, other=0.0),
        tl.load(pre + size, mask=valid, other=0.0),
        tl.load(pre + 2 * size, mask=valid, other=0.0),
        state,
        keep,
        eta,
        grad,
        norms,
        valid,
        size,
        ACTIVATION,
        GATE_NORM,
        HAS_ETA,
    )
    grad_pre += row * 3 * size + columns
    tl.store(grad_pre, grad_target, mask=valid)
    tl.store(grad_pre + size, grad_update, mask=valid)
    tl.store(grad_pre + 2 * size, grad_embedded, mask=valid)
    tl.store(grad_state, grad_hidden, mask=valid)
    if operand is not None:
        operand += in_step * 2 * size + columns
        tl.store(operand, grad_target.to(operand.dtype.element_ty), mask=valid)
        tl.store(operand + size, grad_update.to(operand.dtype.element_ty), mask=valid)
    if GATE_NORM is not None:
        grad_norms += in_step * 6 * size + columns
        for i in tl.static_range(6):
            add_to(grad_norms + i * size, of_norms[i], valid)


# All steps with lambda = 0, a program for ROWS rows of one replica.


@triton.jit
def _add_tile_product(total, left, right, PRECISION: tl.constexpr):
    left = left.to(right.dtype)
    if _INTERPRETED:  # which cannot multiply bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=_STEP_NUMBERS)
def sequence_forward(
    pre,
    hidden,
    mask,
    weight,
    gate_gain,
    gate_shift,
    gain,
    shift,
    scalars,
    outputs,
    steps,
    batch,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
    HAS_ETA: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`weight` is `(K, BLOCK_N, 2, BLOCK_N)`: transposed, see `_padded`."""
    replica = tl.program_id(1).to(tl.int64)
    stride = tl.num_programs(1).to(tl.int64) * batch * size  # of a step
    line = tl.arange(0, ROWS)[:, None]
    row = tl.program_id(0) * ROWS + line
    columns = tl.arange(0, BLOCK_N)[None, :]
    in_chunk = tl.arange(0, CHUNK)[:, None]
    in_size = columns < size
    valid = (row < batch) & in_size
    first = (replica * batch + tl.program_id(0) * ROWS) * size  # of the rows in a step
    line *= size  # tiles of offsets stay in 32 bits: they stay in registers for the whole loop
    hidden += first
    outputs += first
    pre += 3 * first
    if mask is not None:
        mask += first
    norms = _load_norms(gate_gain, gate_shift, gain, shift, replica, columns, size)
    eta = tl.load(scalars + 2 * replica)
    zoneout = tl.load(scalars + 2 * replica + 1)
    weight += replica * 2 * BLOCK_N * BLOCK_N
    state = tl.load(hidden + line + columns, mask=valid, other=0.0)
    previous = hidden
    for _ in range(steps):
        of_step = pre + 3 * line + columns
        target = tl.load(of_step, mask=valid, other=0.0)
        update = tl.load(of_step + size, mask=valid, other=0.0)
        for k in range(0, size, CHUNK):
            # a tile in registers cannot be cut, so the state is read again, piece by piece
            inner = k + tl.arange(0, CHUNK)[None, :]
            left = tl.load(previous + line + inner, mask=(row < batch) & (inner < size), other=0.0)
            of_weight = weight + k * 2 * BLOCK_N + in_chunk * 2 * BLOCK_N + columns
            target = _add_tile_product(target, left, tl.load(of_weight), PRECISION)
            update = _add_tile_product(update, left, tl.load(of_weight + BLOCK_N), PRECISION)
        tl.store(of_step, target, mask=valid)
        tl.store(of_step + size, update, mask=valid)
        embedded = tl.load(of_step + 2 * size, mask=valid, other=0.0)
        keep = zoneout
        if mask is not None:
            keep = tl.load(mask + line + columns, mask=valid, other=0.0)
            mask += stride
        state = _step(
            target,
            update,
            embedded,
            state,
            keep,
            eta,
            norms,
            valid,
            size,
            ACTIVATION,
            GATE_NORM,
            HAS_ETA,
        )
        tl.store(outputs + line + columns, state, mask=valid)
        tl.debug_barrier()  # all of the state is there before the next step reads it
        previous = outputs
        outputs += stride
        pre += 3 * stride


@triton.jit(do_not_specialize=_STEP_NUMBERS)
def sequence_backward(
    pre,
    hidden,
    mask,
    weight,
    gate_gain,
    gate_shift,
    gain,
    shift,
    scalars,
    outputs,
    grad_outputs,
    grad_state,
    grad_pre,
    grad_norms,
    steps,
    batch,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
    HAS_ETA: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`weight` is `(K, 2, BLOCK_N, BLOCK_N)`, `grad_norms` `(K, programs, 6N)`."""
    block = tl.program_id(0)
    replica = tl.program_id(1).to(tl.int64)
    stride = tl.num_programs(1).to(tl.int64) * batch * size
    line = tl.arange(0, ROWS)[:, None]
    row = block * ROWS + line
    columns = tl.arange(0, BLOCK_N)[None, :]
    in_chunk = tl.arange(0, CHUNK)[:, None]
    in_size = columns < size
    valid = (row < batch) & in_size
    first = (replica * batch + block * ROWS) * size
    line *= size
    hidden += first
    grad_state += first
    norms = _load_norms(gate_gain, gate_shift, gain, shift, replica, columns, size)
    eta = tl.load(scalars + 2 * replica)
    zoneout = tl.load(scalars + 2 * replica + 1)
    weight += replica * 2 * BLOCK_N * BLOCK_N
    grad_norms += (replica * tl.num_programs(0) + block) * 6 * size + columns
    grad = tl.load(grad_state + line + columns, mask=valid, other=0.0)
    last = first + (steps - 1) * stride
    pre += 3 * last
    outputs += last - stride  # those of the step before
    grad_outputs += last
    grad_pre += 3 * last
    if mask is not None:
        mask += last
    for step in range(steps):
        if step == steps - 1:
            state = tl.load(hidden + line + columns, mask=valid, other=0.0)
        else:
            state = tl.load(outputs + line + columns, mask=valid, other=0.0)
        keep = zoneout
        if mask is not None:
            keep = tl.load(mask + line + columns, mask=valid, other=0.0)
            mask -= stride
        of_step = pre + 3 * line + columns
        grad_target, grad_update, grad_embedded, grad_hidden, of_norms = _step_backward(
            tl.load(of_step, mask=valid, other=0.0),
            tl.load(of_step + size, mask=valid, other=0.0),
            tl.load(of_step + 2 * size, mask=valid, other=0.0),
            state,
            keep,
            eta,
            grad + tl.load(grad_outputs + line + columns, mask=valid, other=0.0),
            norms,
            valid,
            size,
            ACTIVATION,
            GATE_NORM,
            HAS_ETA,
        )
        to_step = grad_pre + 3 * line + columns
        tl.store(to_step, grad_target, mask=valid)
        tl.store(to_step + size, grad_update, mask=valid)
        tl.store(to_step + 2 * size, grad_embedded, mask=valid)
        if GATE_NORM is not None:
            for i in tl.static_range(6):
                add_to(grad_norms + i * size, tl.sum(of_norms[i], 0, keep_dims=True), in_size)
        tl.debug_barrier()  # all of the gradient is there before the product reads it
        grad = grad_hidden
        for k in range(0, size, CHUNK):
            inner = k + tl.arange(0, CHUNK)[None, :]
            inside = (row < batch) & (inner < size)
            of_gates = grad_pre + 3 * line + inner
            of_weight = weight + k * BLOCK_N + in_chunk * BLOCK_N + columns
            left = tl.load(of_gates, mask=inside, other=0.0)
            grad = _add_tile_product(grad, left, tl.load(of_weight), PRECISION)
            left = tl.load(of_gates + size, mask=inside, other=0.0)
            of_weight += BLOCK_N * BLOCK_N
            grad = _add_tile_product(grad, left, tl.load(of_weight), PRECISION)
        pre -= 3 * stride
        outputs -= stride
        grad_outputs -= stride
        grad_pre -= 3 * stride
    tl.store(grad_state + line + columns, grad, mask=valid)


# All steps with lambda = 1, a program for one sample. Rows are [1, BLOCK_N].


@triton.jit
def _times(matrix, row):
    """The matrix on a vector."""
    return tl.sum(matrix * row, 1)[None, :]


@triton.jit
def _column(row, BLOCK_N: tl.constexpr):
    # not tl.trans: its layout would spread to the matrices, and those would be turned too
    return tl.reshape(row, (BLOCK_N,))[:, None]


@triton.jit(do_not_specialize=_STEP_NUMBERS)
def memory_forward(
    pre,
    hidden,
    mask,
    weight,
    memory,
    gate_gain,
    gate_shift,
    gain,
    shift,
    scalars,
    outputs,
    steps,
    batch,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
    HAS_ETA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`weight` is `(K, 2, BLOCK_N, BLOCK_N)`, `memory` `(K, B, BLOCK_N, BLOCK_N)`."""
    row = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * size
    replica = row // batch
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = columns < size
    of_matrix = tl.arange(0, BLOCK_N)[:, None] * BLOCK_N + columns
    norms = _load_norms(gate_gain, gate_shift, gain, shift, replica, columns, size)
    eta = tl.load(scalars + 2 * replica)
    zoneout = tl.load(scalars + 2 * replica + 1)
    weight += replica * 2 * BLOCK_N * BLOCK_N
    memory += row * BLOCK_N * BLOCK_N
    matrix = tl.load(memory + of_matrix)
    pre += 3 * row * size
    outputs += row * size
    if mask is not None:
        mask += row * size
    state = tl.load(hidden + row * size + columns, mask=valid, other=0.0)
    for _ in range(steps):
        operand = state.to(weight.dtype.element_ty).to(tl.float32)
        of_target = tl.load(weight + of_matrix).to(tl.float32)
        target = tl.load(pre + columns, mask=valid, other=0.0) + _times(of_target, operand)
        of_update = tl.load(weight + BLOCK_N * BLOCK_N + of_matrix).to(tl.float32)
        update = tl.load(pre + size + columns, mask=valid, other=0.0) + _times(of_update, operand)
        embedded = tl.load(pre + 2 * size + columns, mask=valid, other=0.0)
        tl.store(pre + columns, target, mask=valid)
        tl.store(pre + size + columns, update, mask=valid)
        target, update, _, _, _ = _gates(target, update, norms, valid, size, GATE_NORM)
        plane = _plane(embedded, target)
        r, w, scale_r, scale_w = plane[1], plane[2], plane[3], plane[4]
        rotated, _, _ = _turn(plane, state)
        turned = _times(matrix, rotated)
        first = scale_r * _times(matrix, r)
        second = scale_w * (_times(matrix, w) - dot(r, w) * first)
        matrix -= _column(first, BLOCK_N) * r
        matrix -= _column(second, BLOCK_N) * w
        mixed, _, _ = _mix(
            embedded + turned, state, update, norms, valid, size, ACTIVATION, GATE_NORM
        )
        keep = zoneout
        if mask is not None:
            keep = tl.load(mask + columns, mask=valid, other=0.0)
            mask += stride
        state = _new_state(mixed, state, keep, eta, HAS_ETA)
        tl.store(outputs + columns, state, mask=valid)
        pre += 3 * stride
        outputs += stride
    tl.store(memory + of_matrix, matrix)


@triton.jit(do_not_specialize=_STEP_NUMBERS)
def memory_backward(
    pre,
    hidden,
    mask,
    weight,
    memory,
    skew,
    gate_gain,
    gate_shift,
    gain,
    shift,
    scalars,
    outputs,
    grad_outputs,
    grad_state,
    grad_pre,
    grad_norms,
    steps,
    batch,
    size,
    ACTIVATION: tl.constexpr,
    GATE_NORM: tl.constexpr,
    HAS_ETA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """As `memory_forward`; `skew` is as `memory`, `grad_norms` `(K, B, 6N)`."""
    row = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * size
    replica = row // batch
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = columns < size
    of_matrix = tl.arange(0, BLOCK_N)[:, None] * BLOCK_N + columns
    norms = _load_norms(gate_gain, gate_shift, gain, shift, replica, columns, size)
    eta = tl.load(scalars + 2 * replica)
    zoneout = tl.load(scalars + 2 * replica + 1)
    weight += replica * 2 * BLOCK_N * BLOCK_N
    memory += row * BLOCK_N * BLOCK_N
    skew += row * BLOCK_N * BLOCK_N
    matrix = tl.load(memory + of_matrix)
    carried = tl.load(skew + of_matrix)
    hidden += row * size + columns
    grad_state += row * size + columns
    grad_norms += row * 6 * size + columns
    grad = tl.load(grad_state, mask=valid, other=0.0)
    last = (steps - 1) * stride
    pre += 3 * (last + row * size)
    grad_pre += 3 * (last + row * size)
    outputs += last - stride + row * size
    grad_outputs += last + row * size
    if mask is not None:
        mask += last + row * size
    for step in range(steps):
        if step == steps - 1:
            state = tl.load(hidden, mask=valid, other=0.0)
        else:
            state = tl.load(outputs + columns, mask=valid, other=0.0)
        keep = zoneout
        if mask is not None:
            keep = tl.load(mask + columns, mask=valid, other=0.0)
            mask -= stride
        target, update, gate, of_target, of_update = _gates(
            tl.load(pre + columns, mask=valid, other=0.0),
            tl.load(pre + size + columns, mask=valid, other=0.0),
            norms,
            valid,
            size,
            GATE_NORM,
        )
        embedded = tl.load(pre + 2 * size + columns, mask=valid, other=0.0)
        plane = _plane(embedded, target)
        e, r, w, scale_r, scale_w = plane[0], plane[1], plane[2], plane[3], plane[4]
        rw = dot(r, w)
        mixed, candidate, of_total = _mix(
            embedded + _times(matrix, state),
            state,
            update,
            norms,
            valid,
            size,
            ACTIVATION,
            GATE_NORM,
        )
        grad += tl.load(grad_outputs + columns, mask=valid, other=0.0)
        grad, kept = _new_state_backward(grad, mixed, keep, eta, HAS_ETA)
        grad_total, grad_update, grad_hidden, scaled = _mix_backward(
            grad, state, update, candidate, of_total, norms, valid, size, ACTIVATION, GATE_NORM
        )

        # The memory goes back by the rotation, its gradient takes the turned state's with it.
        z = tl.sum(matrix * _column(grad_total, BLOCK_N), 0, keep_dims=True)
        first = scale_w * _times(matrix, w)
        second = scale_r * (_times(matrix, r) - rw * first)
        matrix -= _column(first, BLOCK_N) * w
        matrix -= _column(second, BLOCK_N) * r
        skew_w = _times(carried, w) + z * dot(state, w) - state * dot(z, w)
        skew_r = _times(carried, r) + z * dot(state, r) - state * dot(z, r)
        skew_e = skew_w - skew_r
        grad_w = -scale_w * skew_w
        grad_r = grad_w + scale_r * (skew_e - scale_w * dot(w, skew_e) * w)
        turned_r = skew_r + scale_w * dot(skew_w, r) * w + grad_w * rw
        carried += _column(z, BLOCK_N) * state
        carried -= _column(state, BLOCK_N) * z
        carried += _column(scale_w * w, BLOCK_N) * skew_w
        carried += _column(grad_w, BLOCK_N) * w
        carried += _column(scale_r * r, BLOCK_N) * turned_r
        carried -= _column(scale_r * turned_r, BLOCK_N) * r

        grad_target, grad_update, scaled_target, scaled_update = _gates_backward(
            (grad_r - dot(grad_r, r) * r) * plane[6],
            grad_update,
            gate,
            of_target,
            of_update,
            norms,
            valid,
            size,
            GATE_NORM,
        )
        tl.store(grad_pre + columns, grad_target, mask=valid)
        tl.store(grad_pre + size + columns, grad_update, mask=valid)
        grad_embedded = grad_total + (grad_w - dot(grad_w, e) * e) * plane[5]
        tl.store(grad_pre + 2 * size + columns, grad_embedded, mask=valid)
        if GATE_NORM is not None:
            add_to(grad_norms, scaled_target * of_target[0], valid)
            add_to(grad_norms + size, scaled_update * of_update[0], valid)
            add_to(grad_norms + 2 * size, scaled * of_total[0], valid)
            add_to(grad_norms + 3 * size, scaled_target, valid)
            add_to(grad_norms + 4 * size, scaled_update, valid)
            add_to(grad_norms + 5 * size, scaled, valid)
        tl.debug_barrier()  # all of the gradient is there before the product reads it
        products = tl.zeros((CHUNK, BLOCK_N), tl.float32)  # whole weights would not fit beside
        for gate_index in tl.static_range(2):
            for k in range(0, size, CHUNK):
                inner = k + tl.arange(0, CHUNK)[:, None]
                of_gate = tl.load(
                    grad_pre + gate_index * size + inner, mask=inner < size, other=0.0
                ).to(weight.dtype.element_ty)
                of_weight = tl.load(weight + (gate_index * BLOCK_N + inner) * BLOCK_N + columns)
                products += of_gate.to(tl.float32) * of_weight.to(tl.float32)
        grad = kept + grad_hidden + z + tl.sum(products, 0, keep_dims=True)
        pre -= 3 * stride
        grad_pre -= 3 * stride
        outputs -= stride
        grad_outputs -= stride
    tl.store(memory + of_matrix, matrix)
    tl.store(skew + of_matrix, carried)
    tl.store(grad_state, grad, mask=valid)


# How kernels are launched.


def block_of(size: int) -> int:
    """Numbers in a row of a tile; at least 16, for products of tiles."""
    return max(16, 1 << (size - 1).bit_length())


def launched_on(warps: int) -> dict[str, Any]:
    """Options of a launch."""
    return {"num_warps": warps, "enable_fp_fusion": True}  # else Triton 3.9 warns


def warps_of(block: int) -> int:
    """Warps for a program with one row."""
    return min(16, max(1, block // 256))
