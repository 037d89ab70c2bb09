"""Makes lstm_projected.safetensors beside this file: outputs and gradients of torch.nn.LSTM(proj_size=…).

Run with torch 2.15 (any build of it; the layer runs on the CPU in f64):  python lstm_projected.py

Every value that goes in is exact in f32; what comes out of f64 is rounded to f32 once, when it is written.
"""

import json
import pathlib
import struct

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

INPUT, HIDDEN, OUTPUT, LENGTHS = 3, 7, 4, [5, 2, 6, 1]


def values(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, dtype=torch.float32) * 2 - 1).double()


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_()


def main() -> None:
    assert torch.__version__.startswith("2.15."), torch.__version__
    torch.manual_seed(5)
    seq, batch = max(LENGTHS), len(LENGTHS)
    layer = torch.nn.LSTM(INPUT, HIDDEN, proj_size=OUTPUT, bidirectional=True).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(values(*weight.shape))
    x, h0, c0 = (leaf(values(*shape)) for shape in [(seq, batch, INPUT), (2, batch, OUTPUT), (2, batch, HIDDEN)])
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    packed, (h, c) = layer(packed, (h0, c0))
    y, _ = pad_packed_sequence(packed)
    d_y, d_h, d_c = values(*y.shape), values(*h.shape), values(*c.shape)
    ((y * d_y).sum() + (h * d_h).sum() + (c * d_c).sum()).backward()

    tensors = {"x": x, "h0": h0, "c0": c0, "y": y, "h": h, "c": c, "d_y": d_y, "d_h": d_h, "d_c": d_c}
    tensors |= {"d_x": x.grad, "d_h0": h0.grad, "d_c0": c0.grad}
    for name, weight in layer.named_parameters():
        tensors |= {name: weight, f"d_{name}": weight.grad}
    header, data = {}, b""
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().float().flatten().tolist()
        start, data = len(data), data + struct.pack(f"<{len(flat)}f", *flat)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path = pathlib.Path(__file__).with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


if __name__ == "__main__":
    main()
