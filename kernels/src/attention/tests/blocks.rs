//! Block lists against the naive form with a bias that hides the same: ln of how often a block is listed.

use super::*;

/// Lists over blocks that do not divide the lengths, one for all heads and one for each, with other masks and
/// without.
pub(super) fn cases() -> Vec<Case> {
    let bigbird =
        |block: usize, seq: usize, rule| BlockList::bigbird(block, seq.div_ceil(block), rule).unwrap();
    let mut all = Vec::new();
    for (block, seq) in [(4, 50), (16, 140), (7, 60), (64, 300), (150, 400)] {
        for rule in [BigBird::Paper { random: 2, seed: 3 }, BigBird::HfEval { random: 2 }] {
            let mut case = Case::new(shape(2, 2, seq, seq, 8));
            case.lists = vec![bigbird(block, seq, rule)];
            if block == 4 {
                case.lists.push(bigbird(block, seq, BigBird::Paper { random: 1, seed: 9 }));
                case.shape.kv_heads = 1;
                case.causal = Some(0);
                case = case.filled();
            }
            if block == 16 {
                case.lengths = Some(vec![seq, 37]);
            }
            all.push(case);
        }
    }
    // Rows that see nothing, keys that nobody sees, more keys than rows.
    let lists = [vec![1], vec![], vec![4, 1, 1]];
    let lists = vec![BlockList::new(10, 7, &lists).unwrap()];
    all.push(Case { lists, ..Case::new(shape(1, 2, 27, 66, 5)) });
    all
}

/// The same with a bias instead of the lists.
pub(super) fn dense(case: &Case) -> Case {
    let Shape { heads, seq_q, seq_k, .. } = case.shape;
    let count = |h: usize, i: usize, j: usize| {
        let list = &case.lists[h % case.lists.len()];
        list.keys(i / list.block()).iter().filter(|&&block| block == j / list.block()).count()
    };
    let mut dense = Case { lists: Vec::new(), bias_heads: heads, ..case.clone() };
    let pairs = (0..heads * seq_q * seq_k).map(|x| (x / seq_k / seq_q, x / seq_k % seq_q, x % seq_k));
    dense.data.bias = pairs.map(|(h, i, j)| (count(h, i, j) as f32).ln()).collect();
    dense
}

#[test]
fn lists_are_the_dense_mask() {
    for case in cases() {
        case.check_as(&dense(&case));
    }
}

#[test]
fn probabilities_know_the_lists() {
    for case in cases() {
        let Shape { seq_q, seq_k, heads, .. } = case.shape;
        let exact = dense(&case).naive::<f64, _>(|a, _| attention_probabilities(a));
        let [q_layout, k_layout, ..] = case.layouts();
        let q = HeadsRef::new(&case.data.q, q_layout).unwrap();
        let k = HeadsRef::new(&case.data.k, k_layout).unwrap();
        for_each_isa(|ctx| {
            let mut p = Guarded::poisoned(seq_q * seq_k);
            let out = MatMut::new(p.body_mut(), seq_q, seq_k).unwrap();
            probabilities(ctx, q, k, &case.spec(), (0, heads - 1), out).unwrap();
            p.check();
            let exact = &exact[(heads - 1) * seq_q * seq_k..][..seq_q * seq_k];
            assert_within(p.body(), exact, |_| 1e-5);
        });
    }
}

#[test]
fn misfits_are_named() {
    let lists = [BlockList::new(4, 3, &[vec![0], vec![1], vec![2]]).unwrap()];
    assert!(Mask::none().with_blocks(&lists).check(1, 2, 12, 12).is_ok());
    for (heads, seq_q, seq_k, lists) in [
        (2, 13, 12, lists.to_vec()),
        (2, 12, 13, lists.to_vec()),
        (3, 12, 12, [lists.clone(), lists.clone()].concat()),
        (3, 12, 12, vec![]),
    ] {
        let error = Mask::none().with_blocks(&lists).check(1, heads, seq_q, seq_k).unwrap_err();
        assert!(error.to_string().contains("mask.blocks"), "{error}");
    }
}
