//! Cells of other frameworks in this project's layout, which is PyTorch's.
//!
//! | | here and in PyTorch | Keras |
//! |---|---|---|
//! | weights | `[gates·hidden, in]` | `[in, gates·hidden]` |
//! | gates of the LSTM | i f g o | i f c o |
//! | its biases | one with each product | one |
//! | gates of the GRU | r z n | z r h |
//! | its biases | one with each product, that of n inside of the reset | two rows: input, state (`reset_after`) |
//! | those of the GRU that resets before the product | (none in PyTorch) | one |
//! | biases of the plain cell | one with each product | one |
//! | minGRU, minLSTM (no layer of either; a dense one) | z n, f i n; one bias | the same |
//!
//! A GRU without `reset_after` multiplies the state by r before its product with the weights: another function, and the
//! cell `gru_reset_before`. As a `gru` it is refused.
//!
//! # Source
//! PyTorch's documentation of `torch.nn.LSTM` and `torch.nn.GRU`; `keras/src/layers/rnn/{lstm,gru}.py` of Keras 3.

use super::tensors::Tensors;
use crate::io::CheckpointError;
use crate::models::CellKind;

/// Which of a cell's four tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    InputWeight,
    StateWeight,
    InputBias,
    StateBias,
}

/// A tensor of a cell, taken apart by its name here: `encoder.rnn.weight_ih_l0_reverse`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CellTensor<'n> {
    /// `encoder.rnn`.
    stack: &'n str,
    part: Part,
    /// `l0_reverse`.
    suffix: &'n str,
}

impl<'n> CellTensor<'n> {
    /// `None` for a tensor that belongs to no cell.
    pub(super) fn parse(name: &'n str) -> Option<CellTensor<'n>> {
        const PARTS: [(&str, Part); 4] = [
            (".weight_ih_", Part::InputWeight),
            (".weight_hh_", Part::StateWeight),
            (".bias_ih_", Part::InputBias),
            (".bias_hh_", Part::StateBias),
        ];
        PARTS.into_iter().find_map(|(infix, part)| {
            let (stack, suffix) = name.split_once(infix)?;
            Some(CellTensor { stack, part, suffix })
        })
    }

    /// The values, of that shape here, out of a PyTorch file. A layer made with `bias=False` has zeros.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] when the tensor is missing or has another shape.
    pub(super) fn pytorch_values(
        &self,
        file: &mut Tensors<'_>,
        shape: &[usize],
    ) -> Result<Vec<f32>, CheckpointError> {
        let CellTensor { stack, suffix, .. } = self;
        let name = |infix: &str| format!("{stack}.{infix}_{suffix}");
        let biases = [name("bias_ih"), name("bias_hh")];
        let name = match self.part {
            Part::InputWeight => name("weight_ih"),
            Part::StateWeight => name("weight_hh"),
            _ if biases.iter().all(|bias| file.shape(bias).is_none()) => {
                return Ok(vec![0.0; shape.iter().product()]);
            }
            Part::InputBias => name("bias_ih"),
            Part::StateBias => name("bias_hh"),
        };
        Ok(file.take(&name, shape)?.to_vec())
    }

    /// The values, of that shape here, out of a Keras file: `{stack}.{suffix}.kernel`, `.recurrent_kernel`, `.bias`.
    /// A layer made with `use_bias=False` has zeros.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] when the tensor is missing, has another shape, or belongs to a GRU without
    /// `reset_after`.
    pub(super) fn keras_values(
        &self,
        file: &mut Tensors<'_>,
        cell: CellKind,
        shape: &[usize],
    ) -> Result<Vec<f32>, CheckpointError> {
        let CellTensor { stack, suffix, part } = self;
        let kernel = match part {
            Part::InputWeight => "kernel",
            Part::StateWeight => "recurrent_kernel",
            Part::InputBias => return keras_bias(file, cell, &format!("{stack}.{suffix}.bias"), 0, shape[0]),
            Part::StateBias => return keras_bias(file, cell, &format!("{stack}.{suffix}.bias"), 1, shape[0]),
        };
        let (rows, input) = (shape[0], shape[1]);
        let values = file.take(&format!("{stack}.{suffix}.{kernel}"), &[input, rows])?;
        Ok(transpose_blocks(values, input, keras_gates(cell)))
    }
}

/// Where each of our gates stands among those of Keras.
fn keras_gates(cell: CellKind) -> &'static [usize] {
    match cell {
        CellKind::Lstm | CellKind::LstmPeephole => &[0, 1, 2, 3],
        CellKind::Gru | CellKind::GruResetBefore => &[1, 0, 2],
        CellKind::Tanh | CellKind::Relu => &[0],
        CellKind::MinGru => &[0, 1],
        CellKind::MinLstm => &[0, 1, 2],
    }
}

/// The bias that goes with the input's product (row 0) or with the state's (row 1).
fn keras_bias(
    file: &mut Tensors<'_>,
    cell: CellKind,
    name: &str,
    row: usize,
    len: usize,
) -> Result<Vec<f32>, CheckpointError> {
    let zeros = || vec![0.0; len];
    if cell == CellKind::Gru && file.shape(name) == Some(&[len]) {
        let problem = format!(
            "has shape [{len}], that of a GRU without reset_after: it multiplies the state by the reset gate before \
             the product with the weights, which is the cell \"gru_reset_before\" of the configuration; a GRU with \
             reset_after=True has [2, {len}]"
        );
        return Err(file.wrong(name, problem));
    }
    let shape = match cell {
        CellKind::Gru => &[2, len][..],
        CellKind::Lstm
        | CellKind::LstmPeephole
        | CellKind::GruResetBefore
        | CellKind::Tanh
        | CellKind::Relu
        | CellKind::MinGru
        | CellKind::MinLstm => &[len],
    };
    let Some(bias) = file.take_if_there(name, shape)? else { return Ok(zeros()) };
    let bias = bias.chunks_exact(len).nth(row);
    Ok(bias.map_or_else(zeros, |bias| transpose_blocks(bias, 1, keras_gates(cell))))
}

/// `[rows, blocks·width]` → `[blocks·width, rows]`; block `b` of the result is block `order[b]` of the columns.
pub(super) fn transpose_blocks(values: &[f32], rows: usize, order: &[usize]) -> Vec<f32> {
    let columns = values.len() / rows;
    let width = columns / order.len();
    let columns_in_order = order.iter().flat_map(|&block| block * width..(block + 1) * width);
    columns_in_order.flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use kavanam_kernels::Context;
    use kavanam_kernels::rnn::Direction;

    use super::*;
    use crate::io::safetensors::{Contents, NamedTensor};
    use crate::nn::rnn::cell_weights;
    use crate::ops::gradient_check::Random;
    use crate::param::ParamStore;
    use crate::pool::Pool;
    use crate::tape::Tape;

    const INPUT: usize = 3;
    const HIDDEN: usize = 5;
    const STEPS: usize = 6;
    const BATCH: usize = 2;
    const KINDS: [CellKind; 4] = [CellKind::Lstm, CellKind::Gru, CellKind::Tanh, CellKind::Relu];
    const KERAS_KINDS: [CellKind; 5] =
        [CellKind::Lstm, CellKind::Gru, CellKind::GruResetBefore, CellKind::Tanh, CellKind::Relu];

    fn random(shapes: &[(&str, &[usize])]) -> Contents {
        let mut random = Random(17);
        let mut tensor = |(name, shape): &(&str, &[usize])| {
            let data = (0..shape.iter().product()).map(|_| random.next()).collect();
            NamedTensor { name: (*name).to_owned(), shape: shape.to_vec(), data }
        };
        let mut contents = Contents { tensors: shapes.iter().map(&mut tensor).collect(), metadata: None };
        contents.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        contents
    }

    fn values(contents: &Contents, name: &str) -> Vec<f64> {
        contents.get(name).map_or_else(Vec::new, |t| t.data.iter().map(|&x| f64::from(x)).collect())
    }

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    /// `x · W` for W `[in, out]`, plus b where there is one.
    fn affine(x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
        let out = w.len() / x.len();
        let column = |j: usize| -> f64 { (0..x.len()).map(|i| x[i] * w[i * out + j]).sum() };
        (0..out).map(|j| column(j) + b.get(j).copied().unwrap_or(0.0)).collect()
    }

    /// `W · x` for W `[out, in]`, plus b where there is one.
    fn affine_rows(x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
        let row = |row: &[f64]| -> f64 { row.iter().zip(x).map(|(w, x)| w * x).sum() };
        w.chunks_exact(x.len()).enumerate().map(|(j, w)| row(w) + b.get(j).copied().unwrap_or(0.0)).collect()
    }

    type State = (Vec<f64>, Vec<f64>);

    /// As torch.nn.LSTM's documentation writes it.
    fn pytorch_lstm(file: &Contents, x: &[f64], (h, c): &State) -> State {
        let v = |name: &str| values(file, &format!("rnn.{name}_l0"));
        let from_x = affine_rows(x, &v("weight_ih"), &v("bias_ih"));
        let from_h = affine_rows(h, &v("weight_hh"), &v("bias_hh"));
        let gate = |k: usize, j: usize| from_x[k * HIDDEN + j] + from_h[k * HIDDEN + j];
        let new_c = |j: usize| sigmoid(gate(1, j)) * c[j] + sigmoid(gate(0, j)) * gate(2, j).tanh();
        let c: Vec<f64> = (0..HIDDEN).map(new_c).collect();
        ((0..HIDDEN).map(|j| sigmoid(gate(3, j)) * c[j].tanh()).collect(), c)
    }

    /// As torch.nn.GRU's documentation writes it.
    fn pytorch_gru(file: &Contents, x: &[f64], (h, _): &State) -> State {
        let v = |name: &str| values(file, &format!("rnn.{name}_l0"));
        let from_x = affine_rows(x, &v("weight_ih"), &v("bias_ih"));
        let from_h = affine_rows(h, &v("weight_hh"), &v("bias_hh"));
        let new_h = |j: usize| {
            let r = sigmoid(from_x[j] + from_h[j]);
            let z = sigmoid(from_x[HIDDEN + j] + from_h[HIDDEN + j]);
            let n = (from_x[2 * HIDDEN + j] + r * from_h[2 * HIDDEN + j]).tanh();
            (1.0 - z) * n + z * h[j]
        };
        ((0..HIDDEN).map(new_h).collect(), Vec::new())
    }

    /// As torch.nn.RNN's documentation writes it.
    fn pytorch_plain(file: &Contents, x: &[f64], (h, _): &State, f: fn(f64) -> f64) -> State {
        let v = |name: &str| values(file, &format!("rnn.{name}_l0"));
        let from_x = affine_rows(x, &v("weight_ih"), &v("bias_ih"));
        let from_h = affine_rows(h, &v("weight_hh"), &v("bias_hh"));
        (from_x.iter().zip(&from_h).map(|(a, b)| f(a + b)).collect(), Vec::new())
    }

    /// As keras's SimpleRNNCell.call computes it.
    fn keras_plain(file: &Contents, x: &[f64], (h, _): &State, f: fn(f64) -> f64) -> State {
        let v = |name: &str| values(file, &format!("rnn.l0.{name}"));
        let from_x = affine(x, &v("kernel"), &v("bias"));
        let from_h = affine(h, &v("recurrent_kernel"), &[]);
        (from_x.iter().zip(&from_h).map(|(a, b)| f(a + b)).collect(), Vec::new())
    }

    fn relu(x: f64) -> f64 {
        x.max(0.0)
    }

    /// As keras's LSTMCell.call computes it.
    fn keras_lstm(file: &Contents, x: &[f64], (h, c): &State) -> State {
        let v = |name: &str| values(file, &format!("rnn.l0.{name}"));
        let from_x = affine(x, &v("kernel"), &v("bias"));
        let from_h = affine(h, &v("recurrent_kernel"), &[]);
        let z: Vec<f64> = from_x.iter().zip(&from_h).map(|(a, b)| a + b).collect();
        let (z0, z1, z2, z3) = (&z[..5], &z[5..10], &z[10..15], &z[15..]);
        let c: Vec<f64> =
            (0..HIDDEN).map(|j| sigmoid(z1[j]) * c[j] + sigmoid(z0[j]) * z2[j].tanh()).collect();
        ((0..HIDDEN).map(|j| sigmoid(z3[j]) * c[j].tanh()).collect(), c)
    }

    /// As keras's GRUCell.call computes it with reset_after.
    fn keras_gru(file: &Contents, x: &[f64], (h, _): &State) -> State {
        let v = |name: &str| values(file, &format!("rnn.l0.{name}"));
        let bias = v("bias");
        let (input_bias, recurrent_bias) = bias.split_at(bias.len() / 2);
        let matrix_x = affine(x, &v("kernel"), input_bias);
        let matrix_inner = affine(h, &v("recurrent_kernel"), recurrent_bias);
        let (x_z, x_r, x_h) = (&matrix_x[..5], &matrix_x[5..10], &matrix_x[10..]);
        let (recurrent_z, recurrent_r, recurrent_h) =
            (&matrix_inner[..5], &matrix_inner[5..10], &matrix_inner[10..]);
        let new_h = |j: usize| {
            let z = sigmoid(x_z[j] + recurrent_z[j]);
            let r = sigmoid(x_r[j] + recurrent_r[j]);
            let hh = (x_h[j] + r * recurrent_h[j]).tanh();
            z * h[j] + (1.0 - z) * hh
        };
        ((0..HIDDEN).map(new_h).collect(), Vec::new())
    }

    /// As keras's GRUCell.call computes it without reset_after.
    fn keras_gru_reset_before(file: &Contents, x: &[f64], (h, _): &State) -> State {
        let v = |name: &str| values(file, &format!("rnn.l0.{name}"));
        let matrix_x = affine(x, &v("kernel"), &v("bias"));
        let inner = affine(h, &v("recurrent_kernel"), &[]);
        let [z, r]: [Vec<f64>; 2] = [0, 1].map(|gate| {
            (0..HIDDEN).map(|j| gate * HIDDEN + j).map(|j| sigmoid(matrix_x[j] + inner[j])).collect()
        });
        let reset: Vec<f64> = r.iter().zip(h).map(|(r, h)| r * h).collect();
        let recurrent_h = affine(&reset, &v("recurrent_kernel"), &[]);
        let new_h = |j: usize| {
            let hh = (matrix_x[2 * HIDDEN + j] + recurrent_h[2 * HIDDEN + j]).tanh();
            z[j] * h[j] + (1.0 - z[j]) * hh
        };
        ((0..HIDDEN).map(new_h).collect(), Vec::new())
    }

    /// The imported layer's states of all steps, and the naive ones.
    fn both(
        cell: CellKind,
        contents: &Contents,
        import: impl Fn(&CellTensor<'_>, &mut Tensors<'_>, &[usize]) -> Result<Vec<f32>, CheckpointError>,
        naive: impl Fn(&Contents, &[f64], &State) -> State,
    ) -> (Vec<f32>, Vec<f64>) {
        let mut store = ParamStore::new(3);
        let weights = cell_weights(&mut store, "rnn", "l0", cell, [INPUT, HIDDEN]);
        let mut file = Tensors::new(Path::new("f"), contents);
        for id in store.ids() {
            let tensor = CellTensor::parse(store.name(id)).unwrap();
            let values = import(&tensor, &mut file, store.shape(id)).unwrap();
            store.get_mut(id).copy_from_slice(&values);
        }
        file.finish().unwrap();

        let mut random = Random(5);
        let x: Vec<f32> = (0..STEPS * BATCH * INPUT).map(|_| random.next()).collect();
        let (ctx, pool) = (Context::detect().unwrap(), Pool::new());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let input = tape.constant(&x, STEPS * BATCH, INPUT).unwrap();
        let lengths: Arc<[usize]> = [STEPS; BATCH].into();
        let out = weights.forward(&mut tape, input, (&lengths, Direction::Forward), None).unwrap();

        let mut states = vec![(vec![0.0; HIDDEN], vec![0.0; HIDDEN]); BATCH];
        let mut expected = Vec::new();
        for (row, x) in x.chunks_exact(INPUT).enumerate() {
            let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let state = &mut states[row % BATCH];
            *state = naive(contents, &x, state);
            expected.extend_from_slice(&state.0);
        }
        (tape.value(out.y).to_vec(), expected)
    }

    fn assert_close((got, expected): (Vec<f32>, Vec<f64>)) {
        assert_eq!(got.len(), expected.len());
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!((f64::from(*got) - expected).abs() < 2e-6, "{i}: {got} {expected}");
        }
    }

    #[test]
    fn pytorch_layers_compute_what_pytorch_documents() {
        for (cell, biased) in KINDS.into_iter().flat_map(|cell| [(cell, true), (cell, false)]) {
            let rows = cell.gates() * HIDDEN;
            let shapes: [(&str, &[usize]); 4] = [
                ("rnn.weight_ih_l0", &[rows, INPUT]),
                ("rnn.weight_hh_l0", &[rows, HIDDEN]),
                ("rnn.bias_ih_l0", &[rows]),
                ("rnn.bias_hh_l0", &[rows]),
            ];
            let contents = random(&shapes[..if biased { 4 } else { 2 }]);
            let import =
                |t: &CellTensor<'_>, f: &mut Tensors<'_>, shape: &[usize]| t.pytorch_values(f, shape);
            assert_close(match cell {
                CellKind::Lstm => both(cell, &contents, import, pytorch_lstm),
                CellKind::Gru => both(cell, &contents, import, pytorch_gru),
                CellKind::Tanh => both(cell, &contents, import, |f, x, s| pytorch_plain(f, x, s, f64::tanh)),
                CellKind::Relu => both(cell, &contents, import, |f, x, s| pytorch_plain(f, x, s, relu)),
                CellKind::LstmPeephole | CellKind::GruResetBefore | CellKind::MinGru | CellKind::MinLstm => {
                    unreachable!("it has no such layer")
                }
            });
        }
    }

    #[test]
    fn keras_layers_compute_what_keras_computes() {
        for (cell, biased) in KERAS_KINDS.into_iter().flat_map(|cell| [(cell, true), (cell, false)]) {
            let columns = cell.gates() * HIDDEN;
            let bias: &[usize] = if cell == CellKind::Gru { &[2, columns] } else { &[columns] };
            let shapes: [(&str, &[usize]); 3] = [
                ("rnn.l0.kernel", &[INPUT, columns]),
                ("rnn.l0.recurrent_kernel", &[HIDDEN, columns]),
                ("rnn.l0.bias", bias),
            ];
            let contents = random(&shapes[..if biased { 3 } else { 2 }]);
            let import =
                |t: &CellTensor<'_>, f: &mut Tensors<'_>, shape: &[usize]| t.keras_values(f, cell, shape);
            assert_close(match cell {
                CellKind::Lstm => both(cell, &contents, import, keras_lstm),
                CellKind::Gru => both(cell, &contents, import, keras_gru),
                CellKind::GruResetBefore => both(cell, &contents, import, keras_gru_reset_before),
                CellKind::Tanh => both(cell, &contents, import, |f, x, s| keras_plain(f, x, s, f64::tanh)),
                CellKind::Relu => both(cell, &contents, import, |f, x, s| keras_plain(f, x, s, relu)),
                CellKind::LstmPeephole | CellKind::MinGru | CellKind::MinLstm => {
                    unreachable!("it has no such layer")
                }
            });
        }
    }

    #[test]
    fn a_gru_without_reset_after_and_half_a_bias_are_refused() {
        let bias = CellTensor::parse("rnn.bias_hh_l0").unwrap();
        let contents = random(&[("rnn.l0.bias", &[15])]);
        let mut file = Tensors::new(Path::new("f"), &contents);
        let error = bias.keras_values(&mut file, CellKind::Gru, &[15]).unwrap_err().to_string();
        assert!(error.contains("\"rnn.l0.bias\"") && error.contains("reset_after=True"), "{error}");
        let contents = random(&[("rnn.bias_ih_l0", &[15])]);
        let mut file = Tensors::new(Path::new("f"), &contents);
        let error = bias.pytorch_values(&mut file, &[15]).unwrap_err().to_string();
        assert!(error.contains("\"rnn.bias_hh_l0\" is missing") && error.contains("[15]"), "{error}");
    }

    #[test]
    fn names_come_apart() {
        let tensor = CellTensor::parse("encoder.rnn.bias_ih_l1_reverse").unwrap();
        assert_eq!(
            (tensor.stack, tensor.part, tensor.suffix),
            ("encoder.rnn", Part::InputBias, "l1_reverse")
        );
        assert_eq!(CellTensor::parse("output.weight"), None);
    }
}
