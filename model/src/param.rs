//! [`ParamStore`]: the named tensors of a model in a fixed order, and [`Grads`], its gradient.
//!
//! All values stand in one flat buffer, one tensor after the other, and so do the gradients: to add
//! up shards, to take a norm or to step an optimiser is one pass over memory.

use std::ops::Range;

use kavanam_kernels::MatRef;
use kavanam_kernels::memory::AlignedVec;

use crate::error::ModelError;
use crate::random::SplitMix64;

/// Names one tensor of a [`ParamStore`]: its index in the fixed order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(usize);

impl ParamId {
    /// The index in the fixed order.
    pub fn index(self) -> usize {
        self.0
    }
}

/// How a tensor is filled at the start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// 0 everywhere.
    Zeros,
    /// 1 everywhere.
    Ones,
    /// Uniform in (−bound, bound).
    Uniform(f32),
    /// Normal with mean 0 and that standard deviation.
    Normal(f32),
    /// Uniform with bound √(6 / (fan_in + fan_out)), for weights [out, in] that may stack several matrices
    /// of `out / stacked` rows (a fused projection, the gates of a cell). Source: Glorot and Bengio 2010, eq. 16.
    Xavier {
        /// How many matrices stand one under the other.
        stacked: usize,
    },
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    name: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// Named f32 tensors in a fixed order.
///
/// The order is the order of [`ParamStore::add`]. The initial values of a tensor depend on the seed,
/// its name and its shape, and on nothing else.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamStore {
    seed: u64,
    entries: Vec<Entry>,
    values: AlignedVec<f32>,
}

impl ParamStore {
    /// A store without tensors, whose tensors will be initialised from `seed`.
    pub fn new(seed: u64) -> ParamStore {
        ParamStore { seed, entries: Vec::new(), values: AlignedVec::new() }
    }

    /// Adds a tensor and fills it.
    ///
    /// # Panics
    /// When the name is taken, or when a Xavier tensor has no two axes: both are mistakes in a model's code.
    pub fn add(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        assert!(self.find(name).is_none(), "two parameters are called {name:?}");
        let start = self.values.len();
        let elements: usize = shape.iter().product();
        let mut random = SplitMix64::new(self.seed ^ fnv1a(name));
        self.values.resize(start + elements);
        let values = &mut self.values[start..];
        match init {
            Init::Zeros => {}
            Init::Ones => values.fill(1.0),
            Init::Uniform(bound) => values.fill_with(|| random.symmetric() * bound),
            Init::Normal(std) => values.fill_with(|| random.normal() * std),
            Init::Xavier { stacked } => {
                let [rows, cols] = *shape else { panic!("{name:?}: Xavier needs a matrix, not {shape:?}") };
                let bound = (6.0 / (rows / stacked + cols) as f32).sqrt();
                values.fill_with(|| random.symmetric() * bound);
            }
        }
        self.entries.push(Entry {
            name: name.to_owned(),
            shape: shape.to_vec(),
            range: start..start + elements,
        });
        ParamId(self.entries.len() - 1)
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many numbers all tensors hold together: the model's parameter count.
    pub fn parameter_count(&self) -> usize {
        self.values.len()
    }

    /// The ids of all tensors in order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = ParamId> + use<> {
        (0..self.entries.len()).map(ParamId)
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.entries.iter().position(|entry| entry.name == name).map(ParamId)
    }

    /// The tensor's name, in PyTorch's style: `encoder.layers.0.norm1.weight`.
    pub fn name(&self, id: ParamId) -> &str {
        &self.entries[id.0].name
    }

    /// The tensor's shape; a weight is [out, in].
    pub fn shape(&self, id: ParamId) -> &[usize] {
        &self.entries[id.0].shape
    }

    /// Where the tensor stands in [`ParamStore::values`] and in [`Grads::values`].
    pub fn range(&self, id: ParamId) -> Range<usize> {
        self.entries[id.0].range.clone()
    }

    /// The tensor's values, row-major.
    pub fn get(&self, id: ParamId) -> &[f32] {
        &self.values[self.range(id)]
    }

    /// The tensor's values, to write.
    pub fn get_mut(&mut self, id: ParamId) -> &mut [f32] {
        let range = self.range(id);
        &mut self.values[range]
    }

    /// A tensor of two axes as a matrix.
    ///
    /// # Panics
    /// When it has another number of axes.
    pub fn matrix(&self, id: ParamId) -> MatRef<'_> {
        let [rows, cols] = *self.shape(id) else { panic!("{:?} is no matrix", self.name(id)) };
        MatRef::new(self.get(id), rows, cols).expect("the store keeps shape and values in step")
    }

    /// All values, tensor after tensor.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All values, to write: for an optimiser's single pass.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Overwrites the tensor of that name.
    ///
    /// # Errors
    /// [`ModelError::Parameter`] when there is none or its shape differs.
    pub fn load(&mut self, name: &str, shape: &[usize], data: &[f32]) -> Result<(), ModelError> {
        let wrong = |problem: String| ModelError::Parameter { name: name.to_owned(), problem };
        let id = self.find(name).ok_or_else(|| wrong("the model has no such tensor".to_owned()))?;
        if self.shape(id) != shape || self.get(id).len() != data.len() {
            return Err(wrong(format!("its shape is {shape:?}, the model's is {:?}", self.shape(id))));
        }
        self.get_mut(id).copy_from_slice(data);
        Ok(())
    }
}

/// One gradient for each value of a [`ParamStore`], in the same order.
#[derive(Debug, Clone, PartialEq)]
pub struct Grads {
    values: AlignedVec<f32>,
    ranges: Vec<Range<usize>>,
}

impl Grads {
    /// Zeros for every tensor of the store.
    pub fn zeros(store: &ParamStore) -> Grads {
        Grads {
            values: AlignedVec::zeroed(store.values.len()),
            ranges: store.entries.iter().map(|e| e.range.clone()).collect(),
        }
    }

    /// Sets all to 0, for the next step.
    pub fn zero(&mut self) {
        self.values.fill(0.0);
    }

    /// Adds another gradient of the same store, element by element.
    ///
    /// # Panics
    /// When the other has another number of values.
    pub fn add(&mut self, other: &Grads) {
        assert_eq!(self.values.len(), other.values.len(), "gradients of two different stores");
        for (a, b) in self.values.iter_mut().zip(&other.values) {
            *a += b;
        }
    }

    /// One tensor's gradient.
    pub fn get(&self, id: ParamId) -> &[f32] {
        &self.values[self.ranges[id.0].clone()]
    }

    /// One tensor's gradient, to accumulate into.
    pub fn get_mut(&mut self, id: ParamId) -> &mut [f32] {
        &mut self.values[self.ranges[id.0].clone()]
    }

    /// Several tensors' gradients at once; nothing for a `None`.
    ///
    /// # Panics
    /// When a tensor is asked for twice.
    pub fn get_disjoint_mut<const N: usize>(
        &mut self,
        ids: [impl Into<Option<ParamId>>; N],
    ) -> [&mut [f32]; N] {
        let ranges = ids.map(|id| id.into().map_or(0..0, |id: ParamId| self.ranges[id.0].clone()));
        self.values.get_disjoint_mut(ranges).expect("each tensor is asked for once")
    }

    /// All gradients, tensor after tensor.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All gradients, to write.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

/// FNV-1a over the bytes of a name, so that every tensor has a stream of its own.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(seed: u64) -> ParamStore {
        let mut store = ParamStore::new(seed);
        store.add("a.weight", &[30, 20], Init::Xavier { stacked: 3 });
        store.add("a.bias", &[30], Init::Zeros);
        store.add("b.weight", &[5000], Init::Normal(0.5));
        store.add("c.weight", &[5000], Init::Uniform(0.1));
        store
    }

    #[test]
    fn the_seed_fixes_every_value_and_names_separate_streams() {
        assert_eq!(store(1), store(1));
        assert_ne!(store(1).values(), store(2).values());
        let s = store(1);
        let (b, c) = (s.find("b.weight").unwrap(), s.find("c.weight").unwrap());
        assert_ne!(s.get(b)[..10], s.get(c)[..10]);
    }

    #[test]
    fn distributions_have_their_bounds_and_moments() {
        let s = store(7);
        let bound = (6.0f32 / 30.0).sqrt();
        assert!(s.get(s.find("a.weight").unwrap()).iter().all(|x| x.abs() < bound));
        assert!(s.get(s.find("c.weight").unwrap()).iter().all(|x| x.abs() < 0.1));
        let normal = s.get(s.find("b.weight").unwrap());
        let mean = normal.iter().sum::<f32>() / 5000.0;
        let variance = normal.iter().map(|x| x * x).sum::<f32>() / 5000.0;
        // Five standard errors: of the mean 0.5/√5000, of the variance 0.25·√(2/5000).
        assert!(mean.abs() < 0.036 && (variance - 0.25).abs() < 0.026, "{mean} {variance}");
    }

    #[test]
    fn loading_checks_name_and_shape() {
        let mut s = store(1);
        assert!(s.load("nobody", &[1], &[0.0]).is_err());
        let error = s.load("a.bias", &[3, 10], &[0.0; 30]).unwrap_err();
        assert!(error.to_string().contains("a.bias"), "{error}");
        s.load("a.bias", &[30], &[2.0; 30]).unwrap();
        assert_eq!(s.get(s.find("a.bias").unwrap()), [2.0; 30]);
        assert_eq!(s.parameter_count(), 600 + 30 + 10_000);
    }

    #[test]
    fn gradients_stand_parallel_to_the_store() {
        let s = store(1);
        let mut a = Grads::zeros(&s);
        let bias = s.find("a.bias").unwrap();
        a.get_mut(bias).fill(1.5);
        let b = a.clone();
        a.add(&b);
        assert_eq!(a.get(bias), [3.0; 30]);
        assert_eq!(a.values().iter().sum::<f32>(), 90.0);
        a.zero();
        assert!(a.values().iter().all(|&x| x == 0.0));
    }
}
