//! [`Tape`]: runs ops eagerly and, when it records, remembers how to go back.
//!
//! An op is a function that takes the tape and [`Var`]s, runs its kernel at once and pushes the
//! result with whatever its backward needs. All values are matrices; weights are no `Var`s but
//! [`crate::ParamId`]s: the tape borrows the store, and a weight's gradient accumulates straight into
//! [`Grads`]. Going back visits the ops from the last to the first and drops each op's value, gradient
//! and saved data as soon as it has run, so the memory shrinks as the gradient proceeds.
//! With recording off the same functions run and keep nothing.

use kavanam_kernels::gemm::PackedWeights;
use kavanam_kernels::rowwise::elementwise;
use kavanam_kernels::{Context, MatRef, ShapeError};

use crate::error::ModelError;
use crate::packed::PackedParams;
use crate::param::{Grads, ParamId, ParamStore};
use crate::pool::{Buffer, Pool};

/// A matrix on a tape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Var(usize);

/// Which random numbers dropout draws: a function of these three and of the op's place on the tape alone,
/// so that no number of threads changes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The training step, below 2³².
    pub step: u64,
    /// The shard of the batch, below 2¹⁶.
    pub shard: u64,
}

/// What an op saved, and how it hands a gradient on.
pub(crate) trait Backward {
    /// Adds to the gradients of the op's inputs and weights, given the gradient of its output `out`.
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError>;
}

impl Var {
    /// The `n`-th result after this one of an op with several.
    pub(crate) fn after(self, n: usize) -> Var {
        Var(self.0 + n)
    }
}

struct Node {
    value: Option<Buffer>,
    rows: usize,
    cols: usize,
    grad: Option<Buffer>,
    backward: Option<Box<dyn Backward>>,
    /// How many nodes from this one on are outputs of this op (0: the output of an op before it).
    outputs: usize,
}

enum Mode {
    Inference,
    Recording { dropout: Option<DropoutKey>, dropouts: u64 },
}

/// A run of ops over the weights of one store.
pub struct Tape<'a> {
    ctx: Context,
    params: &'a ParamStore,
    pool: Pool,
    mode: Mode,
    packed: Option<&'a PackedParams>,
    nodes: Vec<Node>,
}

impl<'a> Tape<'a> {
    fn new(ctx: &Context, params: &'a ParamStore, pool: &Pool, mode: Mode) -> Tape<'a> {
        Tape { ctx: *ctx, params, pool: pool.clone(), mode, packed: None, nodes: Vec::new() }
    }

    /// A tape that keeps nothing and drops nothing out.
    pub fn inference(ctx: &Context, params: &'a ParamStore, pool: &Pool) -> Tape<'a> {
        Tape::new(ctx, params, pool, Mode::Inference)
    }

    /// The same with weights that were packed beforehand.
    #[must_use]
    pub fn with_packed(self, packed: &'a PackedParams) -> Tape<'a> {
        Tape { packed: Some(packed), ..self }
    }

    /// A tape that can go back, without dropout.
    pub fn recording(ctx: &Context, params: &'a ParamStore, pool: &Pool) -> Tape<'a> {
        Tape::new(ctx, params, pool, Mode::Recording { dropout: None, dropouts: 0 })
    }

    /// A tape that can go back, with dropout.
    ///
    /// # Panics
    /// When the step or the shard is outside of its range.
    pub fn training(ctx: &Context, params: &'a ParamStore, pool: &Pool, dropout: DropoutKey) -> Tape<'a> {
        assert!(dropout.step < 1 << 32 && dropout.shard < 1 << 16, "{dropout:?} is out of range");
        Tape::new(ctx, params, pool, Mode::Recording { dropout: Some(dropout), dropouts: 0 })
    }

    /// How kernels run.
    pub fn context(&self) -> &Context {
        &self.ctx
    }

    /// The weights.
    pub fn params(&self) -> &'a ParamStore {
        self.params
    }

    /// A weight's packed transpose, where the tape has packed weights.
    pub(crate) fn packed(&self, weight: ParamId) -> Result<Option<&'a PackedWeights>, ShapeError> {
        self.packed.map(|packed| packed.transposed(&self.ctx, self.params, weight)).transpose()
    }

    /// Whether the tape can go back.
    pub fn is_recording(&self) -> bool {
        matches!(self.mode, Mode::Recording { .. })
    }

    /// The rows and columns of a value.
    pub fn shape(&self, var: Var) -> (usize, usize) {
        let node = &self.nodes[var.0];
        (node.rows, node.cols)
    }

    /// A value, row-major.
    ///
    /// # Panics
    /// When [`Tape::release`] has dropped it.
    pub fn value(&self, var: Var) -> &[f32] {
        self.nodes[var.0].value.as_ref().expect("the value has been released")
    }

    /// A value as a matrix.
    ///
    /// # Panics
    /// As [`Tape::value`].
    pub fn matrix(&self, var: Var) -> MatRef<'_> {
        let (rows, cols) = self.shape(var);
        MatRef::new(self.value(var), rows, cols).expect("`push` checked the size")
    }

    /// A point on the tape for [`Tape::release`].
    pub fn mark(&self) -> Var {
        Var(self.nodes.len())
    }

    /// Without recording, drops the values made since `mark` except those to `keep`: the end of a layer.
    pub fn release(&mut self, mark: Var, keep: &[Var]) {
        if !self.is_recording() {
            for index in mark.0..self.nodes.len() {
                if !keep.contains(&Var(index)) {
                    self.nodes[index].value = None;
                }
            }
        }
    }

    /// A constant: gradients end there.
    ///
    /// # Errors
    /// [`ShapeError`] when `values` does not hold `rows · cols` elements.
    pub fn constant(&mut self, values: &[f32], rows: usize, cols: usize) -> Result<Var, ShapeError> {
        let mut buffer = self.buffer(values.len());
        buffer.copy_from_slice(values);
        MatRef::new(values, rows, cols)?;
        Ok(self.push_node(buffer, rows, cols, None, 1))
    }

    /// Memory for an op's result; its contents are unspecified.
    pub(crate) fn buffer(&self, len: usize) -> Buffer {
        self.pool.take(len)
    }

    /// Appends an op's result; `saved` is called only when the tape records.
    pub(crate) fn push<B: Backward + 'static>(
        &mut self,
        value: Buffer,
        rows: usize,
        cols: usize,
        saved: impl FnOnce() -> B,
    ) -> Var {
        let backward = self.is_recording().then(|| Box::new(saved()) as Box<dyn Backward>);
        self.push_node(value, rows, cols, backward, 1)
    }

    /// Appends a result that there is no way back from: decoding.
    ///
    /// # Panics
    /// When the tape records.
    pub(crate) fn push_inference(&mut self, value: Buffer, rows: usize, cols: usize) -> Var {
        assert!(!self.is_recording(), "this op has no backward");
        self.push_node(value, rows, cols, None, 1)
    }

    /// Appends an op's several results, each with its rows and columns. The backward is handed the first.
    pub(crate) fn push_all<B: Backward + 'static, const N: usize>(
        &mut self,
        values: [(Buffer, usize, usize); N],
        saved: impl FnOnce() -> B,
    ) -> [Var; N] {
        let mut backward = self.is_recording().then(|| Box::new(saved()) as Box<dyn Backward>);
        let mut outputs = N;
        values.map(|(value, rows, cols)| {
            let var = self.push_node(value, rows, cols, backward.take(), outputs);
            outputs = 0;
            var
        })
    }

    fn push_node(
        &mut self,
        value: Buffer,
        rows: usize,
        cols: usize,
        backward: Option<Box<dyn Backward>>,
        outputs: usize,
    ) -> Var {
        assert_eq!(value.len(), rows * cols, "an op's result is {rows} × {cols}");
        self.nodes.push(Node { value: Some(value), rows, cols, grad: None, backward, outputs });
        Var(self.nodes.len() - 1)
    }

    /// The seed and stream of the next dropout op, when the tape drops out at all.
    pub(crate) fn next_dropout(&mut self) -> Option<(u64, u64)> {
        let Mode::Recording { dropout: Some(key), dropouts } = &mut self.mode else { return None };
        let index = *dropouts;
        assert!(index < 1 << 16, "more than 65536 dropouts on one tape");
        *dropouts += 1;
        Some((key.seed, key.step << 32 | key.shard << 16 | index))
    }

    /// Adds the gradient of `loss` (a 1 × 1 value) for every weight to `grads`, and uses the tape up.
    ///
    /// # Errors
    /// [`ModelError`] when a kernel refuses its arguments.
    ///
    /// # Panics
    /// When the tape does not record, or when `loss` is no scalar.
    pub fn backward(self, loss: Var, grads: &mut Grads) -> Result<(), ModelError> {
        self.backward_from(loss, &[1.0], grads)
    }

    /// As [`Tape::backward`] from any value, given the gradient of it.
    ///
    /// # Errors
    /// As [`Tape::backward`].
    ///
    /// # Panics
    /// When the tape does not record, or when `d_out` has another size than `out`.
    pub fn backward_from(self, out: Var, d_out: &[f32], grads: &mut Grads) -> Result<(), ModelError> {
        self.go_back(out, d_out, grads, |_, _| ())
    }

    /// As [`Tape::backward_from`], and shows the gradient of every constant to `seen`.
    pub(crate) fn go_back(
        mut self,
        out: Var,
        d_out: &[f32],
        grads: &mut Grads,
        mut seen: impl FnMut(Var, &[f32]),
    ) -> Result<(), ModelError> {
        assert!(self.is_recording(), "a tape for inference cannot go back");
        let mut seed = self.buffer(d_out.len());
        seed.copy_from_slice(d_out);
        let mut pass = BackwardPass {
            ctx: self.ctx,
            params: self.params,
            grads,
            pool: &self.pool,
            nodes: Nodes(&mut self.nodes),
        };
        assert_eq!(pass.nodes.value(out).len(), d_out.len(), "the gradient of the output");
        pass.nodes.0[out.0].grad = Some(seed);
        for index in (0..=out.0).rev() {
            let outputs = pass.nodes.0[index].outputs;
            let group = index..index + outputs;
            if pass.nodes.0[group.clone()].iter().any(|node| node.grad.is_some()) {
                match pass.nodes.0[index].backward.take() {
                    Some(op) => op.backward(&mut pass, Var(index))?,
                    None => seen(Var(index), pass.nodes.0[index].grad.as_deref().expect("checked above")),
                }
            }
            for node in &mut pass.nodes.0[group] {
                (node.value, node.grad, node.backward) = (None, None, None);
            }
        }
        Ok(())
    }
}

/// The tape on its way back, as an op's backward sees it.
pub(crate) struct BackwardPass<'t> {
    pub(crate) ctx: Context,
    pub(crate) params: &'t ParamStore,
    pub(crate) grads: &'t mut Grads,
    pub(crate) pool: &'t Pool,
    pub(crate) nodes: Nodes<'t>,
}

/// The values and gradients that are still there on the way back.
pub(crate) struct Nodes<'t>(&'t mut [Node]);

impl Nodes<'_> {
    /// A value of the forward pass.
    pub(crate) fn value(&self, var: Var) -> &[f32] {
        self.0[var.0].value.as_ref().expect("values live until their own op has gone back")
    }

    /// A value as a matrix.
    pub(crate) fn matrix(&self, var: Var) -> MatRef<'_> {
        let node = &self.0[var.0];
        MatRef::new(self.value(var), node.rows, node.cols).expect("`push` checked the size")
    }

    /// The rows and columns of a value.
    pub(crate) fn shape(&self, var: Var) -> (usize, usize) {
        (self.0[var.0].rows, self.0[var.0].cols)
    }
}

/// Where a kernel that overwrites writes an input's gradient.
pub(crate) struct Target {
    own: Buffer,
    /// The gradient that later ops left.
    sum: Option<Buffer>,
}

impl Target {
    /// Memory of the input's size, with unspecified contents.
    pub(crate) fn buffer(&mut self) -> &mut [f32] {
        &mut self.own
    }
}

/// Whether a gradient's buffer holds a sum to add to, or nothing yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Unspecified contents: overwrite.
    Fresh,
    /// A gradient from a later op: add to it.
    Partial,
}

impl BackwardPass<'_> {
    /// Takes an op's output gradient; `None` when nothing used that output.
    pub(crate) fn take_grad(&mut self, var: Var) -> Option<Buffer> {
        self.nodes.0[var.0].grad.take()
    }

    /// Takes the gradient of an input to add to it; [`BackwardPass::put_grad`] gives it back.
    pub(crate) fn grad_slot(&mut self, var: Var) -> (Buffer, Slot) {
        match self.nodes.0[var.0].grad.take() {
            Some(partial) => (partial, Slot::Partial),
            None => (self.pool.take(self.nodes.0[var.0].rows * self.nodes.0[var.0].cols), Slot::Fresh),
        }
    }

    /// The gradient of an op's only output.
    pub(crate) fn output_grad(&mut self, out: Var) -> Buffer {
        self.take_grad(out).expect("the tape goes back through ops that have a gradient")
    }

    /// Memory for the gradient of an input from a kernel that overwrites; [`BackwardPass::put`] adds it up.
    pub(crate) fn target(&mut self, x: Var) -> Target {
        let (d_x, slot) = self.grad_slot(x);
        match slot {
            Slot::Fresh => Target { own: d_x, sum: None },
            Slot::Partial => Target { own: self.pool.take(d_x.len()), sum: Some(d_x) },
        }
    }

    /// Adds what a kernel wrote to the gradient of an input.
    pub(crate) fn put(&mut self, x: Var, target: Target) -> Result<(), ShapeError> {
        let Target { own, sum } = target;
        let Some(mut sum) = sum else {
            self.put_grad(x, own);
            return Ok(());
        };
        elementwise::add_assign(&self.ctx, &own, &mut sum)?;
        self.put_grad(x, sum);
        Ok(())
    }

    /// Adds a whole gradient to an input's: without a copy when it is the first.
    pub(crate) fn hand_on(&mut self, x: Var, d: Buffer) -> Result<(), ShapeError> {
        let sum = self.take_grad(x);
        self.put(x, Target { own: d, sum })
    }

    /// Sets the gradient of an input that [`BackwardPass::grad_slot`] took.
    pub(crate) fn put_grad(&mut self, var: Var, grad: Buffer) {
        debug_assert_eq!(grad.len(), self.nodes.0[var.0].rows * self.nodes.0[var.0].cols);
        self.nodes.0[var.0].grad = Some(grad);
    }
}
