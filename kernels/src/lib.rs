//! CPU kernels for sequence models: matrix products, softmax and friends, flash attention, RNN cells,
//! forward and backward, on stable Rust.
//!
//! # Map
//! | room | what it holds |
//! |---|---|
//! | [`isa`] | tokens that prove what the CPU can do |
//! | [`context`] | how a kernel runs: ISA, threads, precision, blocking |
//! | [`view`] | checked matrices, batches of them, and head tensors |
//! | [`lanes`] | loops over vectors, the only tail code |
//! | [`memory`] | aligned memory for large operands, on huge pages |
//! | [`scratch`] | the same, kept by each thread for its next call |
//! | [`attention`] | flash attention: forward, backward, probabilities |
//! | [`math`] | exp, log, tanh, sigmoid, erf, GELU over vectors |
//! | [`rowwise`] | kernels over rows and elements: activations, softmax, norms, losses, embedding, dropout |
//! | [`gemm`] | matrix products with composing epilogues, packed weights, batches |
//! | [`rnn`] | LSTM, GRU and additive attention over whole sequences and single steps |
//! | [`optim`] | AdamW in one pass over memory |
//! | [`mod@reference`] | the naive f64 form of every kernel |
//! | `testing` (feature `testing`) | error bounds, comparators, strategies for shapes |
//!
//! # The numerical contract
//! For one ISA and precision a result has the same bits for any number of threads and for any batch:
//! a row's result depends neither on its neighbours nor on how many there are nor on padding.
//! Each kernel states its error bound against f64; the tests of `reference` and of the crate
//! `kavanam-tests` hold it to that.

pub mod attention;
pub mod context;
pub mod error;
pub mod gemm;
mod invitation;
pub mod isa;
pub mod lanes;
pub mod math;
pub mod memory;
pub mod optim;
mod random;
pub mod reference;
pub mod rnn;
pub mod rowwise;
pub mod scratch;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod transpose;
pub mod view;
mod waiting;

pub use context::{Blocking, Context, Precision};
pub use error::{IsaError, ShapeError};
pub use isa::{Isa, IsaName};
pub use rowwise::Activation;
pub use view::{BatchLayout, HeadsLayout, HeadsMut, HeadsRef, MatBatchMut, MatBatchRef, MatMut, MatRef};
