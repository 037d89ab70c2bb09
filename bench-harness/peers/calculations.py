"""The cases of `kavanam bench` with PyTorch.

A case becomes a Calculation. What a program would do once (packing weights, converting to bf16, the forward pass
before a backward one) happens when it is made, before the clock.
"""

import ctypes
import importlib
import itertools
import os
import re
import sys
import tempfile
import time


def first_line(error):
    """Its kind and what comes before the lists of backends that PyTorch appends."""
    return "%s: %s" % (type(error).__name__, str(error).partition("\n")[0][:500])


def imported(name):
    """The package and what is said of it; whatever keeps it from being imported is its error."""
    try:
        package = importlib.import_module(name)
        return package, {"version": str(package.__version__)}
    except Exception as error:
        return None, {"error": first_line(error)}


numpy, numpy_state = imported("numpy")
torch, torch_state = imported("torch")

PACKAGES = {"numpy": numpy_state, "torch": torch_state}
# The base of models; without PyTorch none is made.
MODULE = torch.nn.Module if torch else object
# What is raised where this version or this CPU lacks an operator.
LACKING = (AttributeError, NotImplementedError, RuntimeError, TypeError)


class Declined(Exception):
    """PyTorch does not do this case."""


class Calculation:
    """Something that can be computed again and again: `call` computes once, `outputs` gives what that wrote."""

    def __init__(self, name, call, outputs):
        self.name = name
        self.call = call
        self.outputs = outputs
        # What runs, the libraries below included.
        self.kernel = name


def keeping(name, function, *arguments, outputs=lambda result: [result]):
    """A calculation whose result is a new tensor each time. The last one is freed before the next is made, so
    that the allocator can give the same memory again."""
    kept = []

    def call():
        kept.clear()
        kept.append(function(*arguments))

    return Calculation(name, call, lambda: outputs(kept[0]))


def fastest(calculations):
    """The fastest of several ways to the same result, by the shortest of a few calls."""
    measured = []
    for calculation in calculations:
        try:
            calculation.call()
            calculation.call()
        except LACKING as error:
            print("%s: %s" % (calculation.name, first_line(error)), file=sys.stderr)
            continue
        measured.append((min(nanoseconds(calculation.call, 1) for _ in range(7)), calculation))
    if not measured:
        raise Declined("none of its forms of this operation runs on this CPU")
    return min(measured, key=lambda pair: pair[0])[1]


def nanoseconds(call, calls):
    """The time of `calls` calls."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return time.perf_counter_ns() - start


# Matrix products.


def product(task, tensors):
    """C = A·B with the strides of the case; a packed B in the form that is fastest here. Of several copies of B each call takes the next one."""
    first = fastest(product_forms(task, tensors["a"], tensors["b"]))
    copies = [first]
    for _ in range(1, task["shape"]["copies"]):
        forms = product_forms(task, tensors["a"], tensors["b"].clone())
        copies.append(next(form for form in forms if form.name == first.name))
    order = itertools.cycle(copies)
    used = []

    def call():
        used[:] = [next(order)]
        used[0].call()

    return first if len(copies) == 1 else Calculation(first.name, call, lambda: used[0].outputs())


def product_forms(task, a, b):
    """The forms of the case, each made when it is asked for."""
    operation, dtype = task["operation"], operand_type(task)
    if operation == "stored":
        yield from stored_forms(a, b, task["shape"])
        return
    if operation == "int8":
        yield from int8_forms(a, b)
        return
    a, b = a.to(dtype), b.to(dtype)
    a = a.t() if operation == "transposed_a" else a
    b = b.t() if operation == "transposed_b" else b
    c = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
    yield Calculation("mm", lambda: torch.mm(a, b, out=c), lambda: [c])
    if operation == "packed":
        yield from packed_forms(a, b)


def packed_forms(a, b):
    """Products with a B that was rearranged beforehand; weights are [out, in] there."""
    weight = b.t().contiguous()
    yield keeping("linear", torch.nn.functional.linear, a, weight)
    rows = a.shape[0]
    if a.dtype == torch.float32:
        packed = attempt(lambda: torch.ops.mkl._mkl_reorder_linear_weight(weight, rows))
        if packed is not None:
            linear = torch.ops.mkl._mkl_linear
            yield keeping("mkl_linear", linear, a, packed, weight, None, rows)
    packed = attempt(lambda: torch.ops.mkldnn._reorder_linear_weight(weight, rows))
    if packed is not None:
        linear = torch.ops.mkldnn._linear_pointwise
        yield keeping("mkldnn_linear", linear, a, packed, None, "none", [], "")


def stored_forms(a, b, shape):
    """Products with a B in fewer bits than f32. Where an operator wants bf16 for A, it gets it beforehand."""
    weight = b.t().contiguous()
    halves = a.to(torch.bfloat16)
    if shape["weights"] == "bf16":
        yield from bf16_forms(halves, b.to(torch.bfloat16))
        return
    groups = weight.view(weight.shape[0], -1, shape["group"])
    largest = 127 if shape["weights"] == "int8" else 7
    scales = groups.abs().amax(2) / largest
    integers = torch.round(groups / scales.unsqueeze(2)).clamp(-largest, largest).view_as(weight)
    if shape["weights"] == "int8":
        integers, scales = integers.to(torch.int8), scales.view(-1)
        for x in (a, halves):
            operator = torch.ops.aten._weight_int8pack_mm
            yield keeping("weight_int8pack_mm " + str(x.dtype), operator, x, integers, scales.to(x.dtype))
        return
    packed = attempt(
        lambda: torch.ops.aten._convert_weight_to_int4pack_for_cpu((integers + 8).to(torch.int32), 1)
    )
    for x in (a, halves) if packed is not None else ():
        pairs = torch.stack([scales.t(), torch.zeros_like(scales.t())], 2).to(x.dtype).contiguous()
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu
        yield keeping("weight_int4pack_mm " + str(x.dtype), operator, x, packed, shape["group"], pairs)


def int8_forms(a, b):
    """Both sides int8, A rounded within the call. A has 7 bits: with 8 the sums saturate where the CPU has no VNNI."""
    weight = b.t().contiguous()
    scales = weight.abs().amax(1) / 127
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    integers = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    for engine in ("fbgemm", "onednn"):
        if engine not in torch.backends.quantized.supported_engines:
            continue
        torch.backends.quantized.engine = engine
        packed = attempt(lambda: torch.ops.quantized.linear_prepack(integers, None))
        if packed is not None:
            yield keeping("linear_dynamic " + engine, torch.ops.quantized.linear_dynamic, a, packed, True)


def bf16_forms(a, b):
    """All in bf16."""
    c = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    yield Calculation("mm", lambda: torch.mm(a, b, out=c), lambda: [c])
    yield from packed_forms(a, b)


def attempt(function):
    """Its result, or None where this PyTorch or this CPU lacks it."""
    try:
        return function()
    except LACKING as error:
        print(first_line(error), file=sys.stderr)
        return None


# Attention.


def attention(task, tensors):
    """Scaled dot-product attention on [batch, heads, seq, dim] views of [batch, seq, heads, dim]."""
    shape, dtype = task["shape"], operand_type(task)
    backward = task["operation"] == "backward"
    if task["operation"] == "bigbird":
        raise Declined("it has no attention over a list of blocks on a CPU")
    if task["operation"] == "decode_int8":
        raise Declined("it has no attention with a cache of integers on a CPU")
    if task["operation"] == "decode_bf16":
        dtype = torch.bfloat16

    def heads_first(tensor):
        return tensor.to(dtype).transpose(1, 2)

    def in_memory_order(tensors):
        return [tensor.transpose(1, 2) for tensor in tensors]

    q, k, v = (heads_first(tensors[name]) for name in "qkv")
    if task["operation"].startswith("decode"):
        # A cache lies head by head.
        k, v = k.contiguous(), v.contiguous()
    q, k, v = (tensor.requires_grad_(backward) for tensor in (q, k, v))

    def forward():
        scaled = torch.nn.functional.scaled_dot_product_attention
        return scaled(q, k, v, **sdpa_options(q, k, shape))

    name = "sdpa_" + sdpa_choice(q, k, v, shape)
    if not backward:
        return keeping(name, forward, outputs=lambda out: in_memory_order([out]))
    out, d_out = forward(), heads_first(tensors["d_out"])

    def gradients():
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    return keeping(name + "_backward", gradients, outputs=in_memory_order)


def sdpa_options(q, k, shape):
    """Of scaled_dot_product_attention; heads of the queries share those of the keys where they are more."""
    return {"is_causal": shape["causal"], "scale": shape["scale"], "enable_gqa": q.shape[1] != k.shape[1]}


def sdpa_choice(q, k, v, shape):
    """The implementation that PyTorch takes for these operands."""
    try:
        choice = torch._fused_sdp_choice(q, k, v, **sdpa_options(q, k, shape))
        return torch.nn.attention.SDPBackend(choice).name.lower()
    except (AttributeError, ValueError):
        return "unknown"


# Recurrent layers.


def recurrent(task, tensors):
    """nn.LSTM, nn.GRU or nn.RNN with the weights of the case, which have PyTorch's order of gates already; or a
    whole model. Under the precision medium the faster one of a layer of bf16 and a layer of f32 within autocast, as training has it."""
    if task["operation"] == "rnnsearch":
        return rnnsearch(task, tensors)
    if task["precision"] != "medium":
        return recurrent_form(task, tensors, torch.float32, False)
    types = (torch.bfloat16, torch.float32)
    return fastest([recurrent_form(task, tensors, dtype, dtype == torch.float32) for dtype in types])


def recurrent_form(task, tensors, dtype, autocast):
    """The layer with weights of that type."""
    shape = task["shape"]
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(shape["cell"], torch.nn.RNN)
    plain = {"nonlinearity": shape["cell"]} if kind is torch.nn.RNN else {}
    layer = kind(shape["width"], shape["width"], dtype=dtype, **plain)
    train = task["operation"] == "train"
    names = {"weight_ih_l0": "w_ih", "weight_hh_l0": "w_hh", "bias_ih_l0": "b_ih", "bias_hh_l0": "b_hh"}
    with torch.no_grad():
        for parameter, name in names.items():
            getattr(layer, parameter).copy_(tensors[name])
    layer.train(train).requires_grad_(train)
    x = tensors["x"].to(dtype)
    name = shape["cell"] + ("_autocast" if autocast else "")

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(x)

    if not train:
        return keeping(name, forward, x, outputs=lambda result: [result[0]])
    x.requires_grad_()
    d_y = tensors["d_y"].to(dtype)
    wanted = [x] + list(layer.parameters())

    def step():
        # The gradients of the weights add up over the calls, those of the input are new in each.
        x.grad = None
        y, _ = forward(x)
        torch.autograd.backward(y, d_y.to(y.dtype), inputs=wanted)
        return y.detach()

    return keeping(name + "_train", step, outputs=lambda y: [y, x.grad])


# A recurrent model with attention.


class RnnSearch(MODULE):
    """A bidirectional GRU, additive attention, a GRU decoder; every sentence has the full length."""

    def __init__(self, width, vocab, autocast):
        super().__init__()
        nn = torch.nn
        self.autocast = autocast
        self.source_embedding = nn.Embedding(vocab, width)
        self.target_embedding = nn.Embedding(vocab, width)
        self.encoder = nn.GRU(width, width, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(2 * width, width)
        self.key = nn.Linear(2 * width, width)
        self.query = nn.Linear(width, width, bias=False)
        self.v = nn.Parameter(torch.empty(width))
        self.decoder = nn.GRUCell(3 * width, width)
        self.readout = nn.Linear(4 * width, width)
        self.output = nn.Linear(width, vocab)

    def take(self, tensors):
        """Loads the weights by the names that the harness gives them."""
        names = {"encoder.rnn.": "encoder.", "bridge.h_l0.": "bridge.", "attention.": "", "decoder.rnn.": "decoder."}
        state = {}
        for name, tensor in tensors.items():
            for theirs, here in names.items():
                name = name.replace(theirs, here)
            name = name.removesuffix("_l0") if name.startswith("decoder.") else name
            state[name] = tensor
        self.load_state_dict(state)

    def forward(self, source, target_in, target_out):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.loss(source, target_in, target_out)

    def loss(self, source, target_in, target_out):
        annotations, last = self.encoder(self.source_embedding(source))
        state = torch.tanh(self.bridge(torch.cat((last[0], last[1]), 1)))
        keys = self.key(annotations)
        reads = []
        for token in self.target_embedding(target_in).unbind(1):
            scores = torch.tanh(self.query(state).unsqueeze(1) + keys) @ self.v
            weights = torch.softmax(scores, 1).unsqueeze(1)
            cell_input = torch.cat((token, torch.bmm(weights.to(annotations.dtype), annotations).squeeze(1)), 1)
            state = self.decoder(cell_input, state)
            reads.append(torch.cat((state, cell_input), 1))
        logits = self.output(torch.tanh(self.readout(torch.stack(reads, 1))))
        flat = logits.flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(flat, target_out.flatten(), reduction="sum")


def rnnsearch(task, tensors):
    """The faster one of the model as it is and the model compiled, on weights and words of the case."""
    words = [tensors.pop(name) for name in ("source", "target_in", "target_out")]
    shape = task["shape"]
    model = RnnSearch(shape["width"], shape["vocab"], task["precision"] == "medium")
    model.take(tensors)

    def form(name, callable):
        def step():
            model.zero_grad(set_to_none=True)
            loss = callable(*words)
            loss.backward()
            return loss.detach()

        return keeping(name, step, outputs=lambda loss: [loss, model.encoder.weight_hh_l0.grad])

    return fastest([form("eager", model), form("compiled", torch.compile(model))])


# Operations on rows. They are f32 under every precision, which speaks of matrix products.


def rowwise(task, tensors):
    """The operators of ATen, into tensors that are there already where PyTorch can write to such."""
    operations = {
        "softmax": softmax,
        "softmax_backward": softmax_backward,
        "layernorm": layernorm,
        "layernorm_backward": layernorm_backward,
        "cross_entropy": cross_entropy,
        "cross_entropy_backward": cross_entropy_backward,
        "gelu": gelu,
        "gelu_backward": gelu_backward,
        "rmsnorm": rmsnorm,
        "residual_layernorm": residual_layernorm,
        "swiglu": swiglu,
        "swiglu_backward": swiglu_backward,
        "adamw": adamw,
        "projected_cross_entropy": projected_cross_entropy,
    }
    shape = task["shape"]
    given = shape["adamw"] if task["operation"] == "adamw" else shape["eps"]
    return operations[task["operation"]](tensors, given)


def softmax(tensors, _):
    x = tensors["x"]
    y = torch.empty_like(x)
    return Calculation("softmax", lambda: torch.ops.aten._softmax.out(x, 1, False, out=y), lambda: [y])


def softmax_backward(tensors, _):
    y, d_y = tensors["x"], tensors["d_y"]
    d_x = torch.empty_like(y)
    operator = torch.ops.aten._softmax_backward_data.out
    return Calculation(
        "softmax_backward", lambda: operator(d_y, y, 1, torch.float32, grad_input=d_x), lambda: [d_x]
    )


def layernorm(tensors, eps):
    x, gamma, beta = tensors["x"], tensors["gamma"], tensors["beta"]
    arguments = (x, gamma.shape, gamma, beta, eps)
    y, mean, rstd = torch.ops.aten.native_layer_norm(*arguments)
    operator = torch.ops.aten.native_layer_norm.out
    return fastest(
        [
            keeping("layer_norm", torch.nn.functional.layer_norm, *arguments),
            Calculation("layer_norm_out", lambda: operator(*arguments, out0=y, out1=mean, out2=rstd), lambda: [y]),
        ]
    )


def layernorm_backward(tensors, eps):
    x, d_y, gamma, beta = (tensors[name] for name in ("x", "d_y", "gamma", "beta"))
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, gamma.shape, gamma, beta, eps)
    return keeping(
        "layer_norm_backward",
        torch.ops.aten.native_layer_norm_backward,
        *(d_y, x, list(gamma.shape), mean, rstd, gamma, beta, [True, True, True]),
        outputs=list,
    )


def cross_entropy(tensors, _):
    x, targets = tensors["x"], tensors["targets"]

    def losses():
        return torch.nn.functional.cross_entropy(x, targets, reduction="none")

    log_y, loss = torch.empty_like(x), torch.empty(x.shape[0])
    total = torch.empty(())

    def losses_out():
        torch.ops.aten._log_softmax.out(x, 1, False, out=log_y)
        torch.ops.aten.nll_loss_forward.output(log_y, targets, None, 0, -100, output=loss, total_weight=total)

    return fastest(
        [keeping("cross_entropy", losses), Calculation("log_softmax_out+nll_loss_out", losses_out, lambda: [loss])]
    )


def cross_entropy_backward(tensors, _):
    """Of log-probabilities that the forward pass kept."""
    x, d_y, targets = tensors["x"], tensors["d_y"], tensors["targets"]
    log_y = torch.log_softmax(x, 1)
    _, total = torch.ops.aten.nll_loss_forward(log_y, targets, None, 0, -100)
    d_log_y, d_x = torch.empty_like(x), torch.empty_like(x)

    def backward():
        nll, softmax = torch.ops.aten.nll_loss_backward, torch.ops.aten._log_softmax_backward_data
        nll.grad_input(d_y, log_y, targets, None, 0, -100, total, grad_input=d_log_y)
        softmax.out(d_log_y, log_y, 1, torch.float32, out=d_x)

    return Calculation("nll_loss_backward+log_softmax_backward", backward, lambda: [d_x])


def gelu(tensors, _):
    x = tensors["x"]
    y = torch.empty_like(x)
    return Calculation("gelu", lambda: torch.ops.aten.gelu.out(x, approximate="none", out=y), lambda: [y])


def gelu_backward(tensors, _):
    x, d_y = tensors["x"], tensors["d_y"]
    d_x = torch.empty_like(x)
    operator = torch.ops.aten.gelu_backward.grad_input
    return Calculation(
        "gelu_backward", lambda: operator(d_y, x, approximate="none", grad_input=d_x), lambda: [d_x]
    )


def rmsnorm(tensors, eps):
    x, gamma = tensors["x"], tensors["gamma"]
    return keeping("rms_norm", torch.nn.functional.rms_norm, x, gamma.shape, gamma, eps)


def residual_layernorm(tensors, eps):
    """The stream after a block, and its norm."""
    x, stream, gamma, beta = (tensors[name] for name in ("x", "d_y", "gamma", "beta"))
    arguments = (gamma.shape, gamma, beta, eps)
    total, y = torch.empty_like(x), torch.empty_like(x)
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, *arguments)
    operator = torch.ops.aten.native_layer_norm.out

    def both():
        torch.add(stream, x, out=total)
        operator(total, *arguments, out0=y, out1=mean, out2=rstd)

    return Calculation("add+layer_norm_out", both, lambda: [total, y])


def swiglu(tensors, _):
    gate, up = tensors["x"], tensors["second"]
    inner, y = torch.empty_like(gate), torch.empty_like(gate)

    def out():
        torch.ops.aten.silu.out(gate, out=inner)
        torch.mul(inner, up, out=y)

    forms = [
        keeping("silu*up", lambda: torch.nn.functional.silu(gate) * up),
        Calculation("silu_out+mul_out", out, lambda: [y]),
    ]
    return fastest(forms)


def swiglu_backward(tensors, _):
    """The three products that autograd makes, into memory that is there."""
    gate, up, d_y = tensors["x"], tensors["second"], tensors["d_y"]
    inner, d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    silu = torch.nn.functional.silu(gate)

    def backward():
        torch.mul(d_y, silu, out=d_up)
        torch.mul(d_y, up, out=inner)
        torch.ops.aten.silu_backward.grad_input(inner, gate, grad_input=d_gate)

    return Calculation("mul+mul+silu_backward", backward, lambda: [d_gate, d_up])


def adamw(tensors, given):
    """The fused step of torch.optim.AdamW(fused=True). What is checked is one step from the case's state."""
    initial = [tensors["x"], torch.zeros_like(tensors["x"]), tensors["second"]]
    state, grad = [tensor.clone() for tensor in initial], tensors["d_y"]
    names = ("lr", "beta1", "beta2", "weight_decay", "eps")
    settings = {name: given[name] for name in names}
    settings.update(amsgrad=False, maximize=False)
    steps = [torch.tensor(float(given["t"]))]

    def step():
        torch._fused_adamw_([state[0]], [grad], [state[1]], [state[2]], [], steps, **settings)

    def outputs():
        for tensor, value in zip(state, initial):
            tensor.copy_(value)
        step()
        return state

    return Calculation("fused_adamw", step, outputs)


def projected_cross_entropy(tensors, _):
    """linear, cross_entropy and their backward pass; the gradients are new tensors in each call."""
    x, weight = (tensors[name].requires_grad_() for name in ("x", "second"))
    targets, d_loss = tensors["targets"], tensors["d_y"]

    def step():
        logits = torch.nn.functional.linear(x, weight)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (losses,) + torch.autograd.grad(losses, (x, weight), d_loss)

    return keeping("linear+cross_entropy", step, outputs=list)


# What every family needs.

FAMILIES = {"gemm": product, "attention": attention, "rnn": recurrent, "rowwise": rowwise}
WITH_GRADIENTS = [
    ("attention", "backward"),
    ("rnn", "train"),
    ("rnn", "rnnsearch"),
    ("rowwise", "projected_cross_entropy"),
]


def operand_type(task):
    """Under the precision medium the operands are bf16, as in a model that was converted to it."""
    return torch.bfloat16 if task["precision"] == "medium" else torch.float32


def initialise():
    """Once a process, before anything is computed."""
    torch.set_num_interop_threads(1)


def threads():
    """The threads that the case runs on."""
    return torch.get_num_threads()


def tensor(data, description):
    """An operand from its bytes; indices become the 64-bit ones that PyTorch takes."""
    indices = description["type"] == "u32"
    array = numpy.frombuffer(data, dtype="<u4" if indices else "<f4").reshape(description["dims"])
    array = array.astype(numpy.int64) if indices else array.copy()
    # A second copy, into memory that PyTorch aligns.
    return torch.from_numpy(array).clone()


def elements(tensor):
    """The elements in memory order, f32."""
    return tensor.detach().float().contiguous().numpy()


def make(task, tensors):
    """Makes the case ready, on its number of threads."""
    torch.set_num_threads(task["threads"])
    torch.set_float32_matmul_precision("high" if task["precision"] == "high" else "highest")
    torch.set_grad_enabled((task["family"], task["operation"]) in WITH_GRADIENTS)
    if task["family"] not in FAMILIES:
        raise Declined("it has no operations of the family " + task["family"])
    prepared = FAMILIES[task["family"]](task, tensors)
    prepared.kernel = " ".join([prepared.name] + libraries(prepared.call))
    return prepared


def libraries(call):
    """What MKL and oneDNN print of one call in their verbose modes: the functions and kernels that ran."""
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        try:
            mkl, mkldnn = torch.backends.mkl, torch.backends.mkldnn
            with mkl.verbose(mkl.VERBOSE_ON), mkldnn.verbose(mkldnn.VERBOSE_ON):
                call()
            ctypes.CDLL(None).fflush(None)
        except LACKING + (OSError,) as error:
            print("no verbose mode: %s" % first_line(error), file=sys.stderr)
        finally:
            os.dup2(2, 1)
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
    found = ["mkl:" + name.lower() for name in re.findall(r"MKL_VERBOSE ([A-Z0-9_]+)\(", text)]
    for kind, kernel in re.findall(r"onednn_verbose,\S*?exec,cpu,(\w+),([^,]*),", text):
        if kind != "reorder":
            found.append("onednn:%s:%s" % (kind, kernel))
    return sorted(set(found))


def engine():
    """The libraries and the instruction set that PyTorch computes with, in a few words."""
    if torch is None:
        return []
    text = torch.__config__.show()
    patterns = {
        "MKL %s": r"Math Kernel Library Version ([\d.]+)",
        "oneDNN %s": r"(?:MKL-DNN|oneDNN) v([\d.]+)",
        "%s": r"CPU capability usage: (\w+)",
    }
    matches = ((words, re.search(pattern, text)) for words, pattern in patterns.items())
    return [words % match.group(1) for words, match in matches if match]
