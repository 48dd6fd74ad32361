//! What others see on the wire: tshark reads probes and answers as BFD, with the fields that they have.

use std::{collections::HashMap, fs};

use nsm_core::liveness::sbfd::State;
use nsm_ebpf_common::{
    management::REQUIRED_MIN_RX_US,
    sbfd::{self, DETECT_MULTIPLIER, frame::Role},
};

use super::support::{TCX, Tap, end, eventually, run, sbfd_in, sendable, two_up};

/// A capture file of Ethernet frames (pcap, version 2.4).
fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 1] {
        file.extend(word.to_ne_bytes());
    }
    for frame in frames {
        let length = frame.len() as u32;
        for word in [0, 0, length, length] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(frame);
    }
    file
}

/// The innermost occurrence of each field, for each packet that the filter lets through.
fn dissect(file: &str, filter: &str, fields: &[&str]) -> Vec<HashMap<String, String>> {
    let mut words = vec![
        "-r",
        file,
        "-Y",
        filter,
        "-T",
        "fields",
        "-E",
        "occurrence=l",
        "-o",
        "udp.check_checksum:TRUE",
        "-o",
        "ip.check_checksum:TRUE",
    ];
    for field in fields {
        words.extend(["-e", field]);
    }
    run("tshark", &words)
        .lines()
        .map(|line| {
            let values = line.split('\t').map(str::to_owned);
            fields
                .iter()
                .map(|field| (*field).to_owned())
                .zip(values)
                .collect()
        })
        .collect()
}

fn number(packet: &HashMap<String, String>, field: &str) -> u32 {
    let text = &packet[field];
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("{field} is {text}"))
}

const FIELDS: &[&str] = &[
    "bfd.version",
    "bfd.diag",
    "bfd.sta",
    "bfd.flags.p",
    "bfd.flags.f",
    "bfd.flags.c",
    "bfd.flags.a",
    "bfd.flags.m",
    "bfd.detect_time_multiplier",
    "bfd.message_length",
    "bfd.my_discriminator",
    "bfd.your_discriminator",
    "bfd.desired_min_tx_interval",
    "bfd.required_min_rx_interval",
    "bfd.required_min_echo_interval",
    "ip.ttl",
    "ip.src",
    "udp.srcport",
    "udp.dstport",
    "udp.length",
];

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, packet sockets; tshark"]
fn tshark_reads_probes_and_answers_as_bfd() {
    two_up(&[TCX], async |world, _by, nodes, peers| {
        // Large probes, too.
        peers[0].want_mtu(1200, 1450);
        let tap = Tap::open(&world.router, "to1");
        let (mut frames, mut large) = (Vec::new(), 0);
        while large < 2 || frames.len() < 24 {
            let frame = tap
                .find("S-BFD", |frame| sbfd_in(frame).map(|_| frame.to_vec()))
                .await;
            large += usize::from(frame.len() > 1_400);
            frames.push(sendable(&frame));
        }
        assert_eq!(
            peers[0].report().await.expect("report").snapshot.state,
            State::Up
        );
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sbfd.pcap");
        fs::write(&path, pcap(&frames)).expect("written");
        let file = path.to_str().expect("UTF-8");

        let roles = |role| {
            let is = |frame: &&Vec<u8>| sbfd_in(frame).is_some_and(|packet| packet.role == role);
            frames.iter().filter(is).count()
        };
        let probes = dissect(file, "bfd.flags.d==1 && vxlan.vni==1", FIELDS);
        let answers = dissect(file, "bfd.flags.d==0 && vxlan.vni==1", FIELDS);
        assert_eq!(probes.len(), roles(Role::Initiator));
        assert_eq!(answers.len(), roles(Role::Reflector));
        assert!(!probes.is_empty() && !answers.is_empty());

        let reflectors = [1, 2].map(|node: u32| {
            let node = &nodes[node as usize - 1];
            node.health.discriminator().get()
        });
        for packet in probes.iter().chain(&answers) {
            assert_eq!(number(packet, "bfd.version"), 1);
            assert_eq!(number(packet, "bfd.sta"), 3, "Up");
            assert_eq!(number(packet, "bfd.diag"), 0);
            assert_eq!(number(packet, "bfd.message_length"), 24);
            assert_eq!(
                number(packet, "bfd.detect_time_multiplier"),
                u32::from(DETECT_MULTIPLIER)
            );
            for flag in ["bfd.flags.p", "bfd.flags.f", "bfd.flags.a", "bfd.flags.m"] {
                assert!(matches!(packet[flag].as_str(), "0" | "False"), "{flag}");
            }
            assert_eq!(number(packet, "bfd.required_min_echo_interval"), 0);
            assert_eq!(number(packet, "ip.ttl"), 255);
        }
        for probe in &probes {
            assert_eq!(number(probe, "udp.dstport"), u32::from(sbfd::PORT));
            assert_eq!(number(probe, "bfd.required_min_rx_interval"), 0);
            let interval = number(probe, "bfd.desired_min_tx_interval");
            assert!((49_152..=50_175).contains(&interval), "{interval} µs");
            assert!(reflectors.contains(&number(probe, "bfd.your_discriminator")));
        }
        for answer in &answers {
            assert_eq!(number(answer, "udp.srcport"), u32::from(sbfd::PORT));
            assert_eq!(
                number(answer, "bfd.required_min_rx_interval"),
                REQUIRED_MIN_RX_US
            );
            assert!(matches!(answer["bfd.flags.c"].as_str(), "1" | "True"));
            assert!(reflectors.contains(&number(answer, "bfd.my_discriminator")));
            // The probe that it answers was captured, too, but for the first ones.
            let of_probe = |probe: &&HashMap<String, String>| {
                probe["bfd.my_discriminator"] == answer["bfd.your_discriminator"]
                    && probe["bfd.desired_min_tx_interval"] == answer["bfd.desired_min_tx_interval"]
            };
            if let Some(probe) = probes.iter().find(of_probe) {
                assert_eq!(probe["udp.srcport"], answer["udp.dstport"]);
                assert_eq!(probe["udp.length"], answer["udp.length"]);
                assert_ne!(probe["ip.src"], answer["ip.src"]);
            }
        }
        let matched = answers.iter().filter(|answer| {
            let number = &answer["bfd.desired_min_tx_interval"];
            probes
                .iter()
                .any(|probe| probe["bfd.desired_min_tx_interval"] == *number)
        });
        assert!(matched.count() + 2 >= answers.len());
        // What tshark finds wrong with a packet, checksums of what is inside among it.
        let flaws = dissect(
            file,
            "_ws.malformed || udp.checksum.status==0 || ip.checksum.status==0",
            &["frame.number", "_ws.expert.message"],
        );
        assert_eq!(flaws, []);
        eventually("up", async || match peers[0].is_up() {
            true => Ok(()),
            false => Err("down".to_owned()),
        })
        .await;
        end(nodes).await;
    });
}
