//! [`Record`]: one measurement, the same shape for every command that measures kernels.

use serde::{Deserialize, Serialize};

/// One case, run by one peer, on one thread count. A file of records is a JSON array.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// The kernel family: `gemm`, `rowwise`, `attention`, `rnn`.
    pub(crate) family: String,
    /// The case's name, for example `square/512`.
    pub(crate) case: String,
    /// Who computed: `ours`, `matrixmultiply`, …
    pub(crate) peer: String,
    /// The peer's version.
    pub(crate) peer_version: String,
    /// The kernel that ran, as far as the peer tells.
    pub(crate) kernel: String,
    /// The precision word that the peer is compared under.
    pub(crate) precision: String,
    /// The instruction set that was asked for; a peer that chooses for itself says `auto`.
    pub(crate) isa: String,
    /// How many threads it could use.
    pub(crate) threads: usize,
    /// The median time of one call in nanoseconds.
    pub(crate) median_ns: f64,
    /// The shortest time of one call in nanoseconds.
    pub(crate) min_ns: f64,
    /// Every sample: nanoseconds a call, averaged over one batch of calls.
    pub(crate) samples_ns: Vec<f64>,
    /// 10⁹ floating-point operations a second at the median; `null` where counting them means nothing.
    pub(crate) gflops: Option<f64>,
    /// 10⁹ bytes read and written a second at the median, each operand counted once.
    pub(crate) gbps: Option<f64>,
    /// `gflops` (or `gbps` in a memory-bound family) in percent of what this machine was measured to reach.
    pub(crate) percent_of_peak: Option<f64>,
    /// Where reading weights or a cache bounds the time: their bytes a second, in percent of what plain reading of as many
    /// bytes reached in samples that alternate with these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) percent_of_read: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_is_exactly_this() {
        let record = Record {
            family: "gemm".into(),
            case: "square/64".into(),
            peer: "ours".into(),
            peer_version: "0.1.0".into(),
            kernel: "f32_6x16_avx2".into(),
            precision: "strict".into(),
            isa: "avx2".into(),
            threads: 2,
            median_ns: 10.5,
            min_ns: 10.0,
            samples_ns: vec![10.0, 11.0],
            gflops: Some(49.9),
            gbps: Some(4.7),
            percent_of_peak: None,
            percent_of_read: Some(90.0),
        };
        let value = serde_json::to_value(&record).unwrap();
        let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected = [
            "family",
            "case",
            "peer",
            "peer_version",
            "kernel",
            "precision",
            "isa",
            "threads",
            "median_ns",
            "min_ns",
            "samples_ns",
            "gflops",
            "gbps",
            "percent_of_peak",
            "percent_of_read",
        ];
        expected.sort_unstable();
        assert_eq!(keys, expected);
        assert_eq!(serde_json::from_value::<Record>(value).unwrap(), record);
    }
}
