//! What attention takes of memory beyond its inputs and outputs, counted by the allocator of this program.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kavanam_kernels::attention::{self, AttentionSpec, BigBird, BlockList, Grads, Inputs, Mask, Saved};
use kavanam_kernels::{Context, HeadsLayout, HeadsMut, HeadsRef, Isa};

/// The system's allocator, which counts the bytes that threads hold, those that count, and the most that were held at once.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread counts: the test harness has threads of its own.
    static COUNTS: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: every call is handed on to the system's allocator as it is; counting touches no memory that it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTS.get() {
            let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
            PEAK.fetch_max(held, Relaxed);
        }
        // SAFETY: the caller's contract is that of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if COUNTS.get() {
            HELD.fetch_sub(layout.size(), Relaxed);
        }
        // SAFETY: as in `alloc`; `ptr` came from there.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Elements of a row in the table and under lists.
const DIM: usize = 32;

/// Elements of a row that is so wide that few of them are held, so that short sequences show what long ones take.
const WIDE: usize = 128;

/// The most bytes that `f` held beyond what it found, on a thread whose scratch memory is empty.
fn peak(f: impl FnOnce() + Send) -> usize {
    std::thread::scope(|scope| {
        let measured = scope.spawn(|| {
            HELD.store(0, Relaxed);
            PEAK.store(0, Relaxed);
            COUNTS.set(true);
            f();
            COUNTS.set(false);
            PEAK.load(Relaxed)
        });
        measured.join().expect("the measured call succeeds")
    })
}

/// The bytes of the forward and of the backward pass over `seq` positions of one head of `dim` elements.
fn passes([seq, dim]: [usize; 2], mask: Mask<'_>) -> [usize; 2] {
    let ctx = Context::with_isa(Isa::best()).threads(NonZeroUsize::MIN);
    let layout = HeadsLayout::batch_seq_heads(1, seq, 1, dim);
    let data: Vec<f32> = (0..seq * dim).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let view = HeadsRef::new(&data, layout).unwrap();
    let spec = AttentionSpec::scaled(dim).with_mask(mask);
    let (mut out, mut lse) = (vec![0.0; seq * dim], vec![0.0; seq]);
    let forward = peak(|| {
        let out = HeadsMut::new(&mut out, layout).unwrap();
        attention::forward(&ctx, &Inputs { q: view, k: view, v: view }, &spec, out, &mut lse).unwrap();
    });
    let out = HeadsRef::new(&out, layout).unwrap();
    let mut grads = [(); 3].map(|()| vec![0.0; seq * dim]);
    let backward = peak(|| {
        let [d_q, d_k, d_v] = grads.each_mut().map(|grad| HeadsMut::new(grad, layout).unwrap());
        let saved = Saved { q: view, k: view, v: view, out, lse: &lse };
        attention::backward(&ctx, &saved, view, &spec, Grads { d_q, d_k, d_v, d_bias: None }).unwrap();
    });
    [forward, backward]
}

fn bigbird(seq: usize) -> [BlockList; 1] {
    [BlockList::bigbird(64, seq / 64, BigBird::Paper { random: 3, seed: 1 }).unwrap()]
}

/// One test, because tests share the counters.
#[test]
fn scratch_memory_does_not_grow_with_the_length() {
    for mask in [Mask::causal(0), Mask::none()] {
        // Both go by equal parts of as many rows as are held at most.
        let [short, long] = [3072, 6144].map(|seq| passes([seq, WIDE], mask));
        assert!(short.iter().all(|bytes| (1..9 << 18).contains(bytes)), "{short:?}");
        assert_eq!(long, short);
    }
    let lists = [8192, 65536].map(bigbird);
    let [few, many] = lists.each_ref().map(|lists| lists[0].keys(1).len());
    assert_eq!(few, many, "a row sees as many blocks in both");
    let [short, long] = [(8192, &lists[0]), (65536, &lists[1])]
        .map(|(seq, list)| passes([seq, DIM], Mask::none().with_blocks(list)));
    assert_eq!(long, short);
}

/// The table of `docs/decisions/003-attention.md`: a minute.
#[test]
#[ignore = "prints a table, and takes a minute"]
fn table() {
    println!(
        "| positions | scores, f32 | forward | backward | BigBird forward | BigBird backward | its list |"
    );
    println!("|--:|--:|--:|--:|--:|--:|--:|");
    for seq in [1024, 4096, 16384, 65536] {
        let [forward, backward] = passes([seq, DIM], Mask::none());
        let list = peak(|| drop(bigbird(seq)));
        let lists = bigbird(seq);
        let [sparse, sparse_backward] = passes([seq, DIM], Mask::none().with_blocks(&lists));
        let kib = |bytes: usize| bytes.div_ceil(1024);
        println!(
            "| {seq} | {} | {} | {} | {} | {} | {} |",
            kib(4 * seq * seq),
            kib(forward),
            kib(backward),
            kib(sparse),
            kib(sparse_backward),
            kib(list)
        );
    }
}
