//! Running a program on a crafted frame (BPF_PROG_TEST_RUN).

use std::time::Duration;

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};

use super::{BpfError, error};

/// What the kernel would say of a frame that stands for several packets of the wire; all zero for a plain one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gso {
    /// Packets.
    pub segs: u32,
    /// Inner payload bytes of each.
    pub size: u32,
}

/// What a program did with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunReport {
    /// What it returned: -1 (TC_ACT_UNSPEC, TCX_NEXT) hands on, 2 (TC_ACT_SHOT, TCX_DROP) drops.
    pub verdict: i32,
    /// Time of one run, the mean of all repetitions.
    pub duration: Duration,
}

// `struct __sk_buff` of the kernel's stable interface (linux/bpf.h): its size, and where the fields are that we set.
const SK_BUFF: usize = 192;
const SK_BUFF_GSO_SEGS: usize = 164;
const SK_BUFF_GSO_SIZE: usize = 176;

pub(super) fn test_run(
    program: &SchedClassifier,
    frame: &[u8],
    gso: Gso,
    repeat: u32,
) -> Result<RunReport, BpfError> {
    run(program, frame, None, gso, repeat).map(|(report, _)| report)
}

/// As [`test_run`], with the frame that the program left.
pub(super) fn test_run_with_output(
    program: &SchedClassifier,
    frame: &[u8],
    gso: Gso,
    repeat: u32,
) -> Result<(RunReport, Vec<u8>), BpfError> {
    let mut output = vec![0; frame.len()];
    let (report, length) = run(program, frame, Some(&mut output), gso, repeat)?;
    output.truncate(length);
    Ok((report, output))
}

fn run(
    program: &SchedClassifier,
    frame: &[u8],
    output: Option<&mut [u8]>,
    gso: Gso,
    repeat: u32,
) -> Result<(RunReport, usize), BpfError> {
    let mut context = [0; SK_BUFF];
    context[SK_BUFF_GSO_SEGS..][..4].copy_from_slice(&gso.segs.to_ne_bytes());
    context[SK_BUFF_GSO_SIZE..][..4].copy_from_slice(&gso.size.to_ne_bytes());
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: output,
        ctx_in: Some(&context),
        repeat,
        ..TestRunOptions::new()
    };
    let result = program
        .test_run(options)
        .map_err(|source| error::running(frame.len(), source))?;
    let report = RunReport {
        verdict: result.return_value.cast_signed(),
        duration: result.duration,
    };
    Ok((report, result.data_size_out as usize))
}
