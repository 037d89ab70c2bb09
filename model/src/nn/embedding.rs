//! Token embeddings.

use kavanam_kernels::ShapeError;

use crate::ops::{self, PositionTable, Tokens};
use crate::param::{Init, ParamId, ParamStore};
use crate::tape::{Tape, Var};

/// `y = scale · E[token] + P[position]`.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// `[vocab, width]`.
    pub table: ParamId,
    /// Multiplies the token's row.
    pub scale: f32,
    /// Added by position.
    pub positions: PositionTable,
}

impl Embedding {
    /// Adds `{name}.weight`, normal with standard deviation 1/√width.
    pub fn new(store: &mut ParamStore, name: &str, vocab: usize, width: usize) -> Embedding {
        let init = Init::Normal((width as f32).sqrt().recip());
        let table = store.add(&format!("{name}.weight"), &[vocab, width], init);
        Embedding { table, scale: 1.0, positions: PositionTable::None }
    }

    /// `[tokens, width]`.
    ///
    /// # Errors
    /// [`ShapeError`] when a token or a position is outside of its table.
    pub fn forward(&self, tape: &mut Tape<'_>, tokens: &Tokens) -> Result<Var, ShapeError> {
        ops::embedding(tape, self.table, tokens, self.scale, &self.positions)
    }
}
