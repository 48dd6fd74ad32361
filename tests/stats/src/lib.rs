//! Statistics of measurements, for the programs that measure and for those that report.
//!
//! All functions are pure. Samples are finite numbers in any order; where there are too few of them for an answer, there is none.

#![forbid(unsafe_code)]

mod work;

pub use work::fixed_work;

/// The confidence that intervals are given for, unless a caller wants another.
pub const CONFIDENCE: f64 = 0.95;

/// The median; of an even number of samples the mean of the two in the middle.
pub fn median(samples: &[f64]) -> Option<f64> {
    let sorted = sorted(samples);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = sorted[(sorted.len() - 1) / 2];
    Some(f64::midpoint(lower, upper))
}

/// The least sample that the share `share` (0 to 1) of all does not exceed: the nearest-rank quantile, which is always a sample.
pub fn quantile(samples: &[f64], share: f64) -> Option<f64> {
    let rank = rank(samples.len(), share)?;
    Some(sorted(samples)[rank - 1])
}

/// The largest sample.
pub fn max(samples: &[f64]) -> Option<f64> {
    quantile(samples, 1.0)
}

/// What a row of the 99th percentile of `n` samples is called: of fewer than a hundred it is their maximum.
pub fn p99_name(n: u64) -> &'static str {
    let rank = rank(usize::try_from(n).unwrap_or(usize::MAX), 0.99);
    if rank.is_some_and(|rank| (rank as u64) < n) {
        "p99"
    } else {
        "p99 (the maximum)"
    }
}

/// An interval that holds the true value with at least the confidence that was asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// The exact confidence, 0 to 1: as few ranks to choose from do not give every confidence.
    pub confidence: f64,
}

/// The interval of the population's median between two samples, by their ranks (the sign test's).
///
/// A sample lies below the true median with probability 1/2 whatever the distribution, so the number of those that do is binomial. No
/// shape is assumed and nothing is drawn at random. There is no answer from fewer than 6 samples at 95 %.
pub fn median_interval(samples: &[f64], confidence: f64) -> Option<Interval> {
    let sorted = sorted(samples);
    let n = sorted.len();
    // The outermost samples first; each step inwards costs confidence.
    let (mut found, mut below) = (None, 0.0);
    for rank in 1..=n / 2 {
        below += binomial_half(n, rank - 1);
        let reached = 1.0 - 2.0 * below;
        if reached < confidence {
            break;
        }
        found = Some(Interval {
            low: sorted[rank - 1],
            high: sorted[n - rank],
            confidence: reached,
        });
    }
    found
}

/// What two things that were measured in pairs are to each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// The median of the pairs' ratios.
    pub median: f64,
    /// Of the median; none where the pairs are too few.
    pub interval: Option<Interval>,
    /// Pairs whose ratio is a number.
    pub n: usize,
}

/// The median of the ratios `first / second`, and its interval. Pairs of which one is not above zero have no ratio.
pub fn paired_ratio(pairs: &[(f64, f64)], confidence: f64) -> Option<Ratio> {
    let ratios: Vec<_> = pairs
        .iter()
        .filter(|(first, second)| *first > 0.0 && *second > 0.0)
        .map(|(first, second)| first / second)
        .filter(|ratio| ratio.is_finite())
        .collect();
    Some(Ratio {
        median: median(&ratios)?,
        interval: median_interval(&ratios, confidence),
        n: ratios.len(),
    })
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The nearest rank, counted from 1.
fn rank(n: usize, share: f64) -> Option<usize> {
    // 0.07 * 100 is a little more than 7 in binary.
    let rank = (n as f64 * share - 1e-9).ceil() as usize;
    (n > 0).then(|| rank.clamp(1, n))
}

/// The probability of `k` heads in `n` throws of a coin; by logarithms, for 2^-n soon is 0.
fn binomial_half(n: usize, k: usize) -> f64 {
    let ways: f64 = (1..=k).map(|i| ((n - k + i) as f64 / i as f64).ln()).sum();
    (ways - n as f64 * std::f64::consts::LN_2).exp()
}
