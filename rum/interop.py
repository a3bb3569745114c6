"""Weights of other implementations, brought into this library's layout."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rum.cells import GRUCell, LSTMCell, RUMCell
from rum.layers import GRU, LSTM, RUM


def rum_from_authors(
    weights: Mapping[str, Tensor],
    *,
    lambda_: float = 0.0,
    eta: float | None = None,
    batch_first: bool = True,
) -> RUM:
    """Builds a one-layer RUM from the `state_dict` of the authors' PyTorch RUM or RUMCell.

    Args:
        weights: `r_kernel` and `u_kernel` `(input_size + N, N)`, `inp_emb_kernel`
            `(input_size, N)`, and the biases `r_bias`, `u_bias`, `inp_emb_bias` `(N,)`, with or
            without the prefix `rum_cell.`.
        lambda_: The cell's `lambda_`, which its `state_dict` does not hold.
        eta: The cell's `eta_`, likewise.
        batch_first: The authors' layer is.

    Raises:
        ValueError: If names or shapes are not those of that layout.

    Source: rotational-unit-of-memory/pytorch/rum_model.py, the version with separate kernels.
    """
    names = {"r_kernel", "u_kernel", "inp_emb_kernel", "r_bias", "u_bias", "inp_emb_bias"}
    plain = {name.removeprefix("rum_cell."): tensor for name, tensor in weights.items()}
    if set(plain) != names or len(weights) != len(names):
        raise ValueError(f"weights must be {sorted(names)}, got {sorted(weights)}")
    input_size, hidden_size = plain["inp_emb_kernel"].shape
    shapes = {
        **dict.fromkeys(("r_kernel", "u_kernel"), (input_size + hidden_size, hidden_size)),
        **dict.fromkeys(("r_bias", "u_bias", "inp_emb_bias"), (hidden_size,)),
    }
    for name, shape in shapes.items():
        if plain[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(plain[name].shape)}")
    layer = RUM(
        input_size,
        hidden_size,
        lambda_=lambda_,
        eta=eta,
        batch_first=batch_first,
        device=plain["r_kernel"].device,
        dtype=plain["r_kernel"].dtype,
    )
    cell = layer.cells[0]
    assert isinstance(cell, RUMCell)
    assert cell.embedding_bias is not None
    with torch.no_grad():
        gates = torch.cat((plain["r_kernel"], plain["u_kernel"]), 1)
        cell.weight_hh.copy_(gates[input_size:].t())
        cell.weight_ih.copy_(torch.cat((gates[:input_size], plain["inp_emb_kernel"]), 1).t())
        cell.bias.copy_(torch.cat((plain["r_bias"], plain["u_bias"])))
        cell.embedding_bias.copy_(plain["inp_emb_bias"])
    return layer


def lstm_from_torch(module: nn.LSTM) -> LSTM:
    """Builds an LSTM that computes what `module` computes; its two biases become one.

    Raises:
        ValueError: If `module` is bidirectional or has projections.
    """
    if module.bidirectional or module.proj_size:
        raise ValueError("module must be unidirectional and without projections")
    layer = LSTM(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        batch_first=module.batch_first,
        dropout=module.dropout,
        forget_bias=0.0,
        device=module.weight_ih_l0.device,
        dtype=module.weight_ih_l0.dtype,
    )
    weights = module.state_dict()
    with torch.no_grad():
        for index, cell in enumerate(layer.cells):
            assert isinstance(cell, LSTMCell)
            cell.weight_ih.copy_(weights[f"weight_ih_l{index}"])
            cell.weight_hh.copy_(weights[f"weight_hh_l{index}"])
            if module.bias:
                cell.bias.copy_(weights[f"bias_ih_l{index}"] + weights[f"bias_hh_l{index}"])
    return layer.train(module.training)


def gru_from_torch(module: nn.GRU) -> GRU:
    """Builds a GRU that computes what `module` computes: `reset_after`, with a bias less a gate.

    Raises:
        ValueError: If `module` is bidirectional.
    """
    if module.bidirectional:
        raise ValueError("module must be unidirectional")
    layer = GRU(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        batch_first=module.batch_first,
        dropout=module.dropout,
        reset_after=True,
        device=module.weight_ih_l0.device,
        dtype=module.weight_ih_l0.dtype,
    )
    weights = module.state_dict()
    gates = slice(0, 2 * module.hidden_size)
    with torch.no_grad():
        for index, cell in enumerate(layer.cells):
            assert isinstance(cell, GRUCell)
            assert cell.hidden_bias is not None
            cell.weight_ih.copy_(weights[f"weight_ih_l{index}"])
            cell.weight_hh.copy_(weights[f"weight_hh_l{index}"])
            cell.bias.zero_()
            if module.bias:
                cell.bias.copy_(weights[f"bias_ih_l{index}"])
                cell.bias[gates] += weights[f"bias_hh_l{index}"][gates]
                cell.hidden_bias.copy_(weights[f"bias_hh_l{index}"][gates.stop :])
    return layer.train(module.training)
