//! The weights of additive attention: score = vᵀ·tanh(W_q·state + W_k·annotation + b).

use kavanam_kernels::ShapeError;

use crate::nn::Linear;
use crate::param::{Init, ParamId, ParamStore};
use crate::tape::{Tape, Var};

/// A feed-forward network that scores how well a source position fits the decoder's state.
///
/// # Source
/// Bahdanau, Cho and Bengio 2015, appendix A.1.2.
#[derive(Debug, Clone, Copy)]
pub struct AdditiveAttention {
    /// `[attention, annotation]` and its bias: the same for all steps, so applied once.
    pub key: Linear,
    /// `[attention, hidden]`: applied each step.
    pub query: ParamId,
    /// `[attention]`.
    pub v: ParamId,
}

impl AdditiveAttention {
    /// Adds `{name}.key`, `{name}.query.weight` and `{name}.v`.
    pub fn new(
        store: &mut ParamStore,
        name: &str,
        [hidden, annotation, width]: [usize; 3],
    ) -> AdditiveAttention {
        let query = Linear::without_bias(store, &format!("{name}.query"), hidden, width);
        AdditiveAttention {
            key: Linear::new(store, &format!("{name}.key"), annotation, width, 1),
            query: query.weights.weight,
            v: store.add(&format!("{name}.v"), &[width], Init::Uniform((width as f32).sqrt().recip())),
        }
    }

    /// The projected annotations, `[rows, attention]`: once for all steps.
    ///
    /// # Errors
    /// [`ShapeError`] when the annotations have another width.
    pub fn keys(&self, tape: &mut Tape<'_>, annotations: Var) -> Result<Var, ShapeError> {
        self.key.forward(tape, annotations)
    }
}
