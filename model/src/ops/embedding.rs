//! `y[r] = scale · E[ids[r]] + P[position of r]`: token and position embedding in one op.

use std::sync::Arc;

use kavanam_kernels::error::expect_dim;
use kavanam_kernels::rowwise::{elementwise, embedding as kernel};
use kavanam_kernels::{MatMut, MatRef, ShapeError};

use crate::param::ParamId;
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// What is looked up.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// One token a row.
    pub ids: Arc<[u32]>,
    /// Rows of one sequence: row r stands at position `first + r mod seq`.
    pub seq: usize,
    /// The position of each sequence's first row (not 0 when decoding goes on).
    pub first: usize,
}

/// The table that is added by position, `[positions, width]`.
#[derive(Debug, Clone)]
pub enum PositionTable {
    /// None: recurrent models.
    None,
    /// A trained one.
    Learned(ParamId),
    /// A constant one.
    Fixed(Arc<Vec<f32>>),
}

/// `y[r] = scale · E[ids[r]] + P[first + r mod seq]`.
///
/// # Shapes
/// E `[vocab, width]`, P `[positions, width]`, y `[ids.len(), width]`.
///
/// # Errors
/// [`ShapeError::Index`] when a token is outside of the table, [`ShapeError`] when the positions do not reach.
pub fn embedding(
    tape: &mut Tape<'_>,
    table: ParamId,
    tokens: &Tokens,
    scale: f32,
    positions: &PositionTable,
) -> Result<Var, ShapeError> {
    let params = tape.params();
    let (rows, width) = (tokens.ids.len(), params.shape(table)[1]);
    let mut y = tape.buffer(rows * width);
    let out = MatMut::new(&mut y, rows, width)?;
    kernel::forward(tape.context(), params.matrix(table), &tokens.ids, scale, out)?;
    let table_values: Option<&[f32]> = match positions {
        PositionTable::None => None,
        PositionTable::Learned(id) => Some(params.get(*id)),
        PositionTable::Fixed(values) => Some(values),
    };
    if let Some(values) = table_values {
        expect_dim("ids", "rows modulo the sequence length", 0, rows % tokens.seq.max(1))?;
        let range = tokens.first * width..(tokens.first + tokens.seq) * width;
        let used = values.get(range.clone()).ok_or(ShapeError::BufferTooShort {
            argument: "positions",
            expected: range.end,
            actual: values.len(),
        })?;
        for sequence in y.chunks_exact_mut((tokens.seq * width).max(1)) {
            elementwise::add_assign(tape.context(), used, sequence)?;
        }
    }
    let (tokens, positions) = (tokens.clone(), positions.clone());
    Ok(tape.push(y, rows, width, || Saved { table, tokens, scale, positions }))
}

struct Saved {
    table: ParamId,
    tokens: Tokens,
    scale: f32,
    positions: PositionTable,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let d_y = pass.output_grad(out);
        let shape = pass.params.shape(self.table);
        let (vocab, width) = (shape[0], shape[1]);
        let d_table = MatMut::new(pass.grads.get_mut(self.table), vocab, width)?;
        let d_out = MatRef::new(&d_y, self.tokens.ids.len(), width)?;
        kernel::backward(&pass.ctx, d_out, &self.tokens.ids, self.scale, d_table)?;
        if let PositionTable::Learned(id) = self.positions {
            let Tokens { seq, first, .. } = self.tokens;
            let d_positions = &mut pass.grads.get_mut(id)[first * width..(first + seq) * width];
            for sequence in d_y.chunks_exact((seq * width).max(1)) {
                elementwise::add_assign(&pass.ctx, sequence, d_positions)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};
    use crate::param::Init;

    fn tokens() -> Tokens {
        Tokens { ids: [4, 0, 4, 2, 1, 4].into(), seq: 3, first: 1 }
    }

    #[test]
    fn gradients_of_both_tables() {
        let mut case = Case::new(4);
        let table = case.store.add("embedding.weight", &[5, 7], Init::Normal(1.0));
        let positions =
            PositionTable::Learned(case.store.add("positions.weight", &[4, 7], Init::Normal(1.0)));
        check(&case, |tape, _| embedding(tape, table, &tokens(), 2.5, &positions));
    }

    #[test]
    fn rows_are_scaled_and_moved_and_errors_are_typed() {
        let mut store = crate::ParamStore::new(1);
        let table = store.add("e", &[5, 2], Init::Normal(1.0));
        let pool = crate::Pool::new();
        let ctx = kavanam_kernels::Context::with_isa(kavanam_kernels::Isa::best());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let fixed = PositionTable::Fixed(Arc::new((0..8).map(|i| i as f32).collect()));
        let y = embedding(&mut tape, table, &tokens(), 2.0, &fixed).unwrap();
        let e = store.get(table);
        assert_eq!(tape.value(y)[4..6], [2.0 * e[8] + 6.0, 2.0 * e[9] + 7.0]);
        let beyond = Tokens { first: 2, ..tokens() };
        assert!(embedding(&mut tape, table, &beyond, 2.0, &fixed).is_err());
        let unknown = Tokens { ids: [5].into(), seq: 1, first: 0 };
        let error = embedding(&mut tape, table, &unknown, 1.0, &PositionTable::None).unwrap_err();
        assert!(matches!(error, ShapeError::Index { index: 5, len: 5, .. }), "{error}");
    }
}
