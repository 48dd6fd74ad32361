//! The statistics against small cases that are known, and against what must hold for all samples.

use nsm_stats::{
    CONFIDENCE, Interval, fixed_work, max, median, median_interval, p99_name, paired_ratio,
    quantile,
};
use proptest::prelude::*;

#[test]
fn medians_lie_in_the_middle() {
    assert_eq!(median(&[]), None);
    assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
}

#[test]
fn quantiles_are_nearest_ranks() {
    let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
    assert_eq!(quantile(&hundred, 0.99), Some(99.0));
    assert_eq!(quantile(&hundred, 0.07), Some(7.0));
    assert_eq!(quantile(&hundred, 0.0), Some(1.0));
    assert_eq!(quantile(&hundred[..50], 0.99), Some(50.0));
    assert_eq!(quantile(&hundred[..50], 0.5), Some(25.0));
    assert_eq!(max(&[2.0, 3.0, 1.0]), Some(3.0));
    assert_eq!(quantile(&[], 0.5), None);
}

#[test]
fn a_p99_that_is_the_maximum_says_so() {
    assert_eq!(p99_name(0), "p99 (the maximum)");
    assert_eq!(p99_name(99), "p99 (the maximum)");
    assert_eq!(p99_name(100), "p99");
    assert_eq!(p99_name(10_000), "p99");
}

#[test]
fn intervals_have_the_ranks_of_the_sign_test() {
    // Tables of the sign test: of 15 samples the 4th and the 12th, of 25 the 8th and the 18th.
    for (n, low, high, confidence) in [
        (6, 1.0, 6.0, 0.968_75),
        (15, 4.0, 12.0, 0.964_84),
        (25, 8.0, 18.0, 0.956_71),
    ] {
        let samples: Vec<f64> = (1..=n).map(f64::from).collect();
        let found = median_interval(&samples, CONFIDENCE).unwrap();
        assert_eq!((found.low, found.high), (low, high), "{n} samples");
        assert!((found.confidence - confidence).abs() < 1e-5, "{found:?}");
    }
    assert_eq!(median_interval(&[1.0; 5], CONFIDENCE), None);
}

#[test]
fn intervals_of_many_samples_are_still_found() {
    let samples: Vec<f64> = (1..=4_000).map(f64::from).collect();
    let found = median_interval(&samples, CONFIDENCE).unwrap();
    // Half of 4,000 and 1.96 standard deviations of 31.6 each.
    assert_eq!((found.low, found.high), (1_938.0, 2_063.0));
    assert!((0.95..0.955).contains(&found.confidence), "{found:?}");
}

/// Every way in which samples can fall on both sides of the true median, each as likely as the other.
#[test]
fn the_confidence_is_exact() {
    for n in 6..=12_usize {
        let samples: Vec<f64> = (0..n).map(|at| at as f64).collect();
        let found = median_interval(&samples, CONFIDENCE).unwrap();
        let excluded = found.low as usize;
        let covers = |sides: &u32| {
            let below = sides.count_ones() as usize;
            below > excluded && n - below > excluded
        };
        let covering = (0..1_u32 << n).filter(covers).count();
        let share = covering as f64 / f64::from(1_u32 << n);
        assert!((share - found.confidence).abs() < 1e-12, "{n}: {share}");
    }
}

#[test]
fn ratios_are_of_one_pair() {
    // The machine was half as fast in the second pair, for both.
    let found = paired_ratio(&[(9.0, 10.0), (4.5, 5.0), (9.0, 10.0)], CONFIDENCE).unwrap();
    assert_eq!((found.median, found.interval, found.n), (0.9, None, 3));
    let six = paired_ratio(&[(2.0, 1.0); 6], CONFIDENCE).unwrap();
    let Some(Interval { low, high, .. }) = six.interval else {
        panic!("no interval: {six:?}");
    };
    assert_eq!((low, high), (2.0, 2.0));
}

#[test]
fn nothing_has_no_ratio() {
    assert_eq!(
        paired_ratio(&[(0.0, 0.0), (1.0, 0.0), (-1.0, 2.0)], CONFIDENCE),
        None
    );
    let found = paired_ratio(&[(0.0, 0.0), (3.0, 2.0)], CONFIDENCE).unwrap();
    assert_eq!((found.median, found.n), (1.5, 1));
}

#[test]
fn the_work_is_the_same_each_time() {
    assert_eq!(fixed_work(), fixed_work());
}

fn samples() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(0.001..1e6_f64, 1..60)
}

proptest! {
    #[test]
    fn quantiles_are_samples_and_grow_with_the_share(samples in samples(), one in 0.0..=1.0, other in 0.0..=1.0) {
        let found = quantile(&samples, one).unwrap();
        prop_assert!(samples.contains(&found));
        let at_most = samples.iter().filter(|sample| **sample <= found).count();
        prop_assert!(at_most as f64 >= one * samples.len() as f64 - 1e-6);
        if one <= other {
            prop_assert!(found <= quantile(&samples, other).unwrap());
        }
    }

    #[test]
    fn the_order_of_samples_does_not_matter(samples in samples()) {
        let reversed: Vec<_> = samples.iter().rev().copied().collect();
        prop_assert_eq!(median(&samples), median(&reversed));
        prop_assert_eq!(median_interval(&samples, CONFIDENCE), median_interval(&reversed, CONFIDENCE));
    }

    #[test]
    fn an_interval_holds_the_median_and_is_confident(samples in samples()) {
        let middle = median(&samples).unwrap();
        let found = median_interval(&samples, CONFIDENCE);
        prop_assert_eq!(found.is_some(), samples.len() >= 6);
        if let Some(found) = found {
            prop_assert!(found.low <= middle && middle <= found.high);
            prop_assert!(found.confidence >= CONFIDENCE && found.confidence < 1.0);
        }
    }

    #[test]
    fn ratios_turn_around_with_their_pairs(pairs in prop::collection::vec((0.01..1e3_f64, 0.01..1e3_f64), 15)) {
        let found = paired_ratio(&pairs, CONFIDENCE).unwrap();
        let turned: Vec<_> = pairs.iter().map(|(first, second)| (*second, *first)).collect();
        let turned = paired_ratio(&turned, CONFIDENCE).unwrap();
        prop_assert!((found.median * turned.median - 1.0).abs() < 1e-9);
        let (ours, theirs) = (found.interval.unwrap(), turned.interval.unwrap());
        prop_assert!((ours.low * theirs.high - 1.0).abs() < 1e-9);
    }
}
