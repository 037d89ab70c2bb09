//! What is sent of a case: the operation in words, its sizes, the operands as they lie in memory.

use kavanam_kernels::Context;
use kavanam_kernels::attention::cache::CacheFormat;
use kavanam_kernels::gemm::WeightFormat;
use kavanam_kernels::rnn::Cell;
use kavanam_kernels::rnn::min_rnn::MinCell;
use kavanam_model::Seq2Seq;
use serde_json::json;

use crate::cases::rnn::Kind;
use crate::cases::rowwise::{ADAMW, ADAMW_T, EPS, RowOp};
use crate::cases::{Problem, attention, gemm, rnn, rnnsearch, rowwise};
use crate::peers::worker::protocol::{Data, Task, Tensor};

/// The case, with the threads and the precision of the context.
pub(super) fn new<'a>(id: u64, problem: &'a Problem, context: &Context) -> Task<'a> {
    let mut task = match problem {
        Problem::Gemm(problem) => gemm_task(problem),
        Problem::Rowwise(problem) => rowwise_task(problem),
        Problem::Attention(problem) => attention_task(problem),
        Problem::Rnn(problem) => rnn_task(problem),
        Problem::RnnSearch(problem) => rnnsearch_task(problem),
    };
    task.id = id;
    task.threads = context.thread_count();
    task.precision = context.matmul_precision().as_str();
    task
}

/// A task that [`new`] completes.
fn task<'a>(
    [family, operation]: [&'static str; 2],
    shape: serde_json::Value,
    tensors: Vec<Tensor<'a>>,
    outputs: Vec<usize>,
) -> Task<'a> {
    Task { id: 0, family, operation, shape, precision: "", threads: 0, tensors, outputs }
}

fn f32s<'a>(name: &'a str, dims: &[usize], values: &'a [f32]) -> Tensor<'a> {
    Tensor { name, dims: dims.to_vec(), data: Data::F32(values) }
}

fn gemm_task(problem: &gemm::Problem) -> Task<'_> {
    let gemm::Shape { m, n, k, layout, .. } = problem.shape;
    let (operation, a, b) = match layout {
        gemm::Layout::Plain => ("plain", [m, k], [k, n]),
        gemm::Layout::TransposedA => ("transposed_a", [k, m], [k, n]),
        gemm::Layout::TransposedB => ("transposed_b", [m, k], [n, k]),
        gemm::Layout::Packed => ("packed", [m, k], [k, n]),
        gemm::Layout::Rounded(_, WeightFormat::Int8) => ("int8", [m, k], [k, n]),
        // PyTorch has no rows in int8 beside int4: its own form of these weights takes part.
        gemm::Layout::Stored(_) | gemm::Layout::Rounded(..) | gemm::Layout::Halves => {
            ("stored", [m, k], [k, n])
        }
    };
    let (weights, group) = match layout {
        gemm::Layout::Stored(WeightFormat::Bf16) | gemm::Layout::Halves => ("bf16", k),
        gemm::Layout::Stored(WeightFormat::Int8) => ("int8", k),
        gemm::Layout::Stored(WeightFormat::Int4 { group })
        | gemm::Layout::Rounded(_, WeightFormat::Int4 { group }) => ("int4", group),
        _ => ("f32", k),
    };
    let shape = json!({"m": m, "n": n, "k": k, "weights": weights, "group": group, "copies": problem.copies});
    let tensors = vec![f32s("a", &a, &problem.a), f32s("b", &b, &problem.b)];
    task(["gemm", operation], shape, tensors, vec![m * n])
}

fn attention_task(problem: &attention::Problem) -> Task<'_> {
    let shape = problem.shape;
    let attention::Shape { batch, heads, kv_heads, seq, dim, causal, pass } = shape;
    let dims = [batch, seq, kv_heads, dim];
    let query_dims = [batch, shape.queries(), heads, dim];
    let mut tensors =
        vec![f32s("q", &query_dims, &problem.q), f32s("k", &dims, &problem.k), f32s("v", &dims, &problem.v)];
    if pass == attention::Pass::Backward {
        tensors.push(f32s("d_out", &query_dims, &problem.d_out));
    }
    let (of_queries, of_keys) = (shape.query_elements(), shape.key_elements());
    let (operation, outputs) = match pass {
        attention::Pass::Forward => ("forward", vec![of_queries]),
        attention::Pass::Backward => ("backward", vec![of_queries, of_keys, of_keys]),
        attention::Pass::Decode => ("decode", vec![of_queries]),
        attention::Pass::DecodeStored(CacheFormat::Bf16) => ("decode_bf16", vec![of_queries]),
        attention::Pass::DecodeStored(CacheFormat::Int8) => ("decode_int8", vec![of_queries]),
        attention::Pass::BigBird => ("bigbird", vec![of_queries]),
    };
    task(["attention", operation], json!({"causal": causal, "scale": shape.scale()}), tensors, outputs)
}

fn rnn_task(problem: &rnn::Problem) -> Task<'_> {
    let shape = problem.shape;
    let rnn::Shape { kind, batch, seq, width, train } = shape;
    let (gates, of_state) = (shape.gate_rows(), shape.state_rows());
    let mut tensors = vec![
        f32s("x", &[seq, batch, width], &problem.x),
        f32s("w_ih", &[gates, width], &problem.w_ih),
        f32s("w_hh", &[of_state, width], &problem.w_hh),
        f32s("b_ih", &[gates], &problem.b_ih),
        f32s("b_hh", &[of_state], &problem.b_hh),
    ];
    if train {
        tensors.push(f32s("d_y", &[seq, batch, width], &problem.d_y));
    }
    let outputs = vec![shape.elements(); if train { 2 } else { 1 }];
    let cell = match kind {
        Kind::Recurrent(Cell::Lstm) => "lstm",
        Kind::Recurrent(Cell::LstmPeephole) => "lstm_peephole",
        Kind::Recurrent(Cell::Gru) => "gru",
        Kind::Recurrent(Cell::GruResetBefore) => "gru_reset_before",
        Kind::Recurrent(Cell::Tanh) => "tanh",
        Kind::Recurrent(Cell::Relu) => "relu",
        Kind::Scan(MinCell::Gru) => "min_gru",
        Kind::Scan(MinCell::Lstm) => "min_lstm",
    };
    let operation = if train { "train" } else { "forward" };
    task(["rnn", operation], json!({"cell": cell, "width": width}), tensors, outputs)
}

/// Every weight under its name, and the words batch-major.
fn rnnsearch_task(problem: &rnnsearch::Problem) -> Task<'_> {
    let rnnsearch::Problem { shape, batch, .. } = problem;
    let params = problem.model.params();
    let mut tensors: Vec<Tensor<'_>> =
        params.ids().map(|id| f32s(params.name(id), params.shape(id), params.get(id))).collect();
    let words =
        [("source", &batch.source), ("target_in", &batch.target_in), ("target_out", &batch.target_out)];
    let dims = vec![shape.batch, shape.seq];
    tensors.extend(words.map(|(name, ids)| Tensor {
        name,
        dims: dims.clone(),
        data: Data::U32(ids.as_slice()),
    }));
    let sizes = json!({"width": shape.width, "vocab": shape.vocab});
    task(["rnn", "rnnsearch"], sizes, tensors, problem.output_lengths().to_vec())
}

fn rowwise_task(problem: &rowwise::Problem) -> Task<'_> {
    let rowwise::Shape { op, rows, cols } = problem.shape;
    let x = f32s("x", &[rows, cols], &problem.x);
    let d_y = |dims: &[usize]| f32s("d_y", dims, &problem.d_y[..dims.iter().product::<usize>()]);
    let of_matrix = || d_y(&[rows, cols]);
    let second = |dims: &[usize]| f32s("second", dims, &problem.second);
    let gamma = f32s("gamma", &[cols], &problem.gamma);
    let beta = f32s("beta", &[cols], &problem.beta);
    let targets = Tensor { name: "targets", dims: vec![rows], data: Data::U32(&problem.targets) };
    let (operation, tensors) = match op {
        RowOp::Softmax => ("softmax", vec![x]),
        RowOp::SoftmaxBackward => ("softmax_backward", vec![x, of_matrix()]),
        RowOp::LayerNorm => ("layernorm", vec![x, gamma, beta]),
        RowOp::LayerNormBackward => ("layernorm_backward", vec![x, of_matrix(), gamma, beta]),
        RowOp::CrossEntropy => ("cross_entropy", vec![x, targets]),
        RowOp::CrossEntropyBackward => ("cross_entropy_backward", vec![x, d_y(&[rows]), targets]),
        RowOp::Gelu => ("gelu", vec![x]),
        RowOp::GeluBackward => ("gelu_backward", vec![x, of_matrix()]),
        RowOp::RmsNorm => ("rmsnorm", vec![x, gamma]),
        RowOp::ResidualLayerNorm => ("residual_layernorm", vec![x, of_matrix(), gamma, beta]),
        RowOp::Swiglu => ("swiglu", vec![x, second(&[rows, cols])]),
        RowOp::SwigluBackward => ("swiglu_backward", vec![x, second(&[rows, cols]), of_matrix()]),
        RowOp::AdamW => ("adamw", vec![x, of_matrix(), second(&[rows, cols])]),
        RowOp::ProjectedCrossEntropy { dim } => {
            let x = f32s("x", &[rows, dim], &problem.x);
            ("projected_cross_entropy", vec![x, second(&[cols, dim]), d_y(&[rows]), targets])
        }
    };
    let adamw = json!({
        "lr": ADAMW.lr,
        "beta1": ADAMW.beta1,
        "beta2": ADAMW.beta2,
        "eps": ADAMW.eps,
        "weight_decay": ADAMW.weight_decay,
        "t": ADAMW_T,
    });
    task(["rowwise", operation], json!({"eps": EPS, "adamw": adamw}), tensors, problem.shape.output_lengths())
}

#[cfg(test)]
mod tests {
    use kavanam_kernels::{Isa, Precision};

    use super::*;
    use crate::cases::{self, Family};
    use crate::measure::threads;

    #[test]
    fn every_quick_case_is_complete() {
        let context = Context::with_isa(Isa::best()).threads(threads::count(2)).precision(Precision::High);
        for family in [Family::Gemm, Family::Rowwise, Family::Attention, Family::Rnn] {
            for case in cases::of(family).into_iter().filter(|case| case.quick) {
                let problem = case.problem();
                let task = new(9, &problem, &context);
                assert_eq!((task.id, task.threads, task.precision), (9, 2, "high"), "{}", case.name);
                assert_eq!(task.family, family.as_str());
                for tensor in &task.tensors {
                    let elements: usize = tensor.dims.iter().product();
                    let len = match tensor.data {
                        Data::F32(values) => values.len(),
                        Data::U32(values) => values.len(),
                    };
                    assert_eq!(elements, len, "{}: {}", case.name, tensor.name);
                }
                assert!(!task.outputs.is_empty() && !task.operation.is_empty(), "{}", case.name);
            }
        }
    }
}
