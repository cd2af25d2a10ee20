"""Cells: the one step of a nonlinear recurrence, as a small stateless object.

A cell says what happens in one step and nothing about time. Whatever of the input can be projected before
the recurrence starts is projected by the caller. The same cell runs as a loop (`recurrent_scan`) or for all
steps at once by Newton's method (`newton_scan`): to that end every cell works on any leading axes, says
which structure the Jacobian of its step has, and packs its state into the layout of that structure.

To add one: subclass `Cell`, as a frozen dataclass, with its state a NamedTuple. A Jacobian written by hand
is optional: automatic differentiation finds it otherwise.
"""

from ostinato.ops.cells.channelwise import ChannelCellHidden, ChannelHidden, ParaGRU, ParaLSTM
from ostinato.ops.cells.headwise import GRU, LSTM, SLSTM, Elman, Hidden, HiddenCell, SLSTMState
from ostinato.ops.cells.matrix import M2RNN, Memory
from ostinato.ops.cells.protocol import Cell, Inputs, State, Weights, autodiff_jacobian, diagonal_of

__all__ = [
    "GRU",
    "LSTM",
    "M2RNN",
    "SLSTM",
    "Cell",
    "ChannelCellHidden",
    "ChannelHidden",
    "Elman",
    "Hidden",
    "HiddenCell",
    "Inputs",
    "Memory",
    "ParaGRU",
    "ParaLSTM",
    "SLSTMState",
    "State",
    "Weights",
    "autodiff_jacobian",
    "diagonal_of",
]
