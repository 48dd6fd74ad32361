//! What the BPF programs cost a packet, in nanoseconds, as JSON on standard output. Needs root.
//!
//! It pins below the directory that it is given, or one of its own, and leaves nothing there.

#[path = "../tests/bpf_kernel/programs.rs"]
mod programs;

use std::{
    env,
    error::Error,
    net::IpAddr,
    path::{Path, PathBuf},
    process,
};

use aya::sys::{Stats, enable_stats};
use nix::sched::{CloneFlags, unshare};
use nsm_core::net::Vni;
use nsm_dataplane::bpf::{Bpf, BpfConfig, Direction};

use programs::{Gso, NEXT, Programs};

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    let own = || format!("/sys/fs/bpf/proxy-nsmgr-cost-{}", process::id()).into();
    let pin_dir = env::args_os().nth(1).map_or_else(own, PathBuf::from);
    for cost in measure(pin_dir)? {
        println!(
            r#"{{"packet":"{}","direction":"{}","run_time_ns":{:.1},"alone_ns":{:.1},"rounds":{}}}"#,
            cost.packet, cost.direction, cost.run_time_ns, cost.alone_ns, cost.rounds
        );
    }
    Ok(())
}

/// Runs in a row of one measurement: the kernel's own count of time has a grain of some ten nanoseconds a run.
const REPEAT: u32 = 20_000;

/// Measurements of a case, of which the median is taken.
const ROUNDS: usize = 9;

/// The cost of one kind of packet.
struct Cost {
    /// What the packet is.
    packet: &'static str,
    /// Which way it goes.
    direction: Direction,
    /// Nanoseconds a packet by the kernel's account (`run_time_ns`), which includes reading a clock before and after.
    run_time_ns: f64,
    /// Nanoseconds a packet without that account.
    alone_ns: f64,
    /// How many measurements both are the medians of.
    rounds: usize,
}

/// Measures the programs by BPF_PROG_TEST_RUN in a network namespace of its own: no real interface is touched.
fn measure(pin_dir: PathBuf) -> Result<Vec<Cost>, Failure> {
    let config = BpfConfig {
        pin_dir,
        ..BpfConfig::default()
    };
    unshare(CloneFlags::CLONE_NEWNET)?;
    let bpf = Bpf::load(&config)?;
    let measured = measure_all(&bpf, &config.pin_dir);
    bpf.detach_and_unpin()?;
    measured
}

fn measure_all(bpf: &Bpf, pin_dir: &Path) -> Result<Vec<Cost>, Failure> {
    let us = [
        IpAddr::from([192, 0, 2, 1]),
        IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 0, 1]),
    ];
    let peer = [
        IpAddr::from([198, 51, 100, 7]),
        IpAddr::from([0x2001, 0xdb8, 2, 0, 0, 0, 0, 7]),
    ];
    let (ours, foreign) = (Vni::MANAGEMENT, 0x12_3456);
    for peer in peer {
        bpf.add_tunnel(ours, peer)?;
    }
    let programs = Programs::over(pin_dir);
    let (web, vxlan) = (443, nsm_ebpf_common::VXLAN_PORT);
    let mut costs = Vec::new();
    for direction in [Direction::In, Direction::Out] {
        let between = |family: usize, port: u16, vni: u32| match direction {
            Direction::In => frame(peer[family], us[family], port, vni),
            Direction::Out => frame(us[family], peer[family], port, vni),
        };
        for (packet, frame) in [
            ("tunnel over IPv4", between(0, vxlan, ours.get())),
            ("tunnel over IPv6", between(1, vxlan, ours.get())),
            ("foreign VNI", between(0, vxlan, foreign)),
            ("other traffic", between(0, web, 0)),
        ] {
            costs.push(measure_one(&programs, packet, direction, &frame)?);
        }
    }
    Ok(costs)
}

fn measure_one(
    programs: &Programs,
    packet: &'static str,
    direction: Direction,
    frame: &[u8],
) -> Result<Cost, Failure> {
    let name = format!("underlay_{direction}");
    let run = || {
        let (run, after) = programs.run(&name, frame, Gso::default(), REPEAT);
        assert!(
            run.return_value.cast_signed() == NEXT && after == frame,
            "{packet} is handed on"
        );
        run.duration
    };
    let accounted_so_far = || programs.get(&name).info().map(|info| info.run_time());
    let mut alone = Vec::with_capacity(ROUNDS);
    let mut accounted = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        alone.push(run().as_nanos() as f64);

        let stats = enable_stats(Stats::RunTime)?;
        let before = accounted_so_far()?;
        run();
        let spent = accounted_so_far()?.saturating_sub(before);
        drop(stats);
        accounted.push(spent.as_nanos() as f64 / f64::from(REPEAT));
    }
    Ok(Cost {
        packet,
        direction,
        run_time_ns: median(accounted),
        alone_ns: median(alone),
        rounds: ROUNDS,
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A UDP datagram in an Ethernet frame, with a VXLAN header and 64 bytes in it. Addresses are of one family.
fn frame(source: IpAddr, destination: IpAddr, port: u16, vni: u32) -> Vec<u8> {
    const UDP: u8 = 17;
    const PAYLOAD: u8 = 8 + 8 + 64;
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let (source6, destination6) = (mapped(source), mapped(destination));
    if source.is_ipv4() {
        frame.extend([
            0x08,
            0x00,
            0x45,
            0,
            0,
            20 + PAYLOAD,
            0,
            1,
            0x40,
            0,
            64,
            UDP,
            0,
            0,
        ]);
        frame.extend([&source6[12..], &destination6[12..]].concat());
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, PAYLOAD, UDP, 64]);
        frame.extend([source6, destination6].concat());
    }
    frame.extend([0x30, 0x39]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, PAYLOAD, 0, 0, 0x08, 0, 0, 0]);
    frame.extend((vni << 8).to_be_bytes());
    frame.extend([0; 64]);
    frame
}

/// An IPv4 address as IPv6 has it mapped.
fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}
