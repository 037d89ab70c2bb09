//! [`PackedParams`]: weights packed for the matrix kernel, once, for decoding.
//!
//! A decoding step multiplies a few rows by every weight: packing them again each step would cost more than the
//! product. Training packs anyway, because its weights change every step.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kavanam_kernels::gemm::{self, PackedWeights};
use kavanam_kernels::{Blocking, Context, ShapeError};

use crate::param::{ParamId, ParamStore};

/// The transposes of a store's matrices, packed when they are first asked for.
#[derive(Debug)]
pub struct PackedParams {
    slots: Vec<OnceLock<PackedWeights>>,
}

impl PackedParams {
    /// Nothing packed yet.
    pub fn new(params: &ParamStore) -> PackedParams {
        PackedParams { slots: params.ids().map(|_| OnceLock::new()).collect() }
    }

    /// `Wᵀ` of a weight `[out, in]`.
    ///
    /// # Errors
    /// As [`PackedWeights::pack`].
    ///
    /// # Panics
    /// When the tensor is no matrix.
    pub fn transposed(
        &self,
        ctx: &Context,
        params: &ParamStore,
        id: ParamId,
    ) -> Result<&PackedWeights, ShapeError> {
        let slot = &self.slots[id.index()];
        if slot.get().is_none() {
            let packed = PackedWeights::pack(ctx, params.matrix(id).t())?;
            // Another thread may have been faster, with the same bits.
            let _ = slot.set(packed);
        }
        Ok(slot.get().expect("set above"))
    }
}

/// What packing depends on.
type Key = (&'static str, Option<Blocking>);

/// One `T` for each kernel that a context may select, dropped when the weights change.
#[derive(Debug)]
pub(crate) struct PerKernel<T>(Mutex<Vec<(Key, Arc<T>)>>);

impl<T> PerKernel<T> {
    pub(crate) fn new() -> PerKernel<T> {
        PerKernel(Mutex::new(Vec::new()))
    }

    /// The one for this context's kernel, made when there is none.
    pub(crate) fn get_or_make<E>(
        &self,
        ctx: &Context,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let key = (gemm::kernel_name(ctx), ctx.forced_blocking());
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = all.iter().find(|(k, _)| *k == key) {
            return Ok(found.clone());
        }
        let made = Arc::new(make()?);
        all.push((key, made.clone()));
        Ok(made)
    }

    /// Forgets all: the weights are about to change.
    pub(crate) fn clear(&mut self) {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use kavanam_kernels::Isa;

    use super::*;
    use crate::param::Init;

    #[test]
    fn each_kernel_gets_its_own_and_clear_forgets() {
        let mut store = ParamStore::new(1);
        let id = store.add("w", &[5, 3], Init::Ones);
        let mut all = PerKernel::new();
        for isa in Isa::available() {
            let ctx = Context::with_isa(isa);
            let make = || Ok::<_, ShapeError>(PackedParams::new(&store));
            let packed: Arc<PackedParams> = all.get_or_make(&ctx, make).unwrap();
            let w = packed.transposed(&ctx, &store, id).unwrap();
            assert_eq!((w.rows(), w.cols(), w.kernel_name()), (3, 5, gemm::kernel_name(&ctx)));
            assert!(Arc::ptr_eq(&packed, &all.get_or_make(&ctx, make).unwrap()));
        }
        all.clear();
        assert!(all.0.lock().unwrap().is_empty());
    }
}
