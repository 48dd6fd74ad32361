//! What the oldest promised kernel would refuse in the object, found without that kernel.
//!
//! Checked: the control flow ([`flow`]), the stack ([`frames`]), and that every instruction, helper and type of map is as old as
//! [`OLDEST`]. Not checked: types in BTF, which the agent's loader rewrites for kernels that do not have them (FLOAT, DECL_TAG, TYPE_TAG,
//! ENUM64, linkage of functions; a newer one it refuses to read); and what the verifier finds by walking the program, its complexity and
//! the bounds that it can prove. For those the programs are loaded on every promised kernel.

use std::fmt;

use anyhow::{Result, bail};

use super::{
    flow, frames,
    program::{self, Flow, Instruction, Program, class},
};

/// A kernel's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Linux(u16, u16);

impl fmt::Display for Linux {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linux {}.{}", self.0, self.1)
    }
}

/// The oldest kernel that README.md promises.
const OLDEST: Linux = Linux(6, 1);

/// The last helper that each kernel brought, by its number (`enum bpf_func_id` of include/uapi/linux/bpf.h at each release). There are
/// none after 6.2: what is newer is a function of the kernel.
const HELPERS: &[(i32, Linux)] = &[
    (175, Linux(5, 15)),
    (179, Linux(5, 16)),
    (185, Linux(5, 17)),
    (193, Linux(5, 18)),
    (203, Linux(5, 19)),
    (207, Linux(6, 0)),
    (209, Linux(6, 1)),
    (211, Linux(6, 2)),
];

/// Likewise the types of maps (`enum bpf_map_type`).
const MAPS: &[(i32, Linux)] = &[
    (29, Linux(5, 11)),
    (30, Linux(5, 16)),
    (31, Linux(6, 1)),
    (32, Linux(6, 2)),
    (33, Linux(6, 9)),
];

/// A kind of instruction that came after the first kernels with bounded loops (5.3).
struct Kind {
    name: &'static str,
    since: Linux,
    is: fn(Instruction) -> bool,
}

/// Operations of arithmetic: the upper four bits of the opcode.
const DIVIDE: u8 = 0x30;
const MODULO: u8 = 0x90;
const MOVE: u8 = 0xb0;
const SWAP: u8 = 0xd0;

/// Modes of memory access, and those of a jump: the upper bits of the opcode.
const MODE: u8 = 0xe0;
const SIGNED: u8 = 0x80;
const ATOMIC: u8 = 0xc0;
const JUMP: u8 = 0x00;
const MAY_GOTO: u8 = 0xe0;

/// BPF_LOAD_ACQ and BPF_STORE_REL, and `lock add` without a result, the only atomic operation of old.
const LOAD_ACQUIRE: i32 = 0x100;
const STORE_RELEASE: i32 = 0x110;
const ATOMIC_ADD: i32 = 0;

/// Sources: Documentation/bpf/standardization/instruction-set.rst, and the releases in which the verifier took each.
const KINDS: &[Kind] = &[
    Kind {
        name: "atomic operation other than add",
        since: Linux(5, 12),
        is: |it| is_atomic(it) && it.imm != ATOMIC_ADD,
    },
    Kind {
        name: "load with sign extension (instruction set v4)",
        since: Linux(6, 6),
        is: |it| it.class() == class::LDX && it.code & MODE == SIGNED,
    },
    Kind {
        name: "move with sign extension (instruction set v4)",
        since: Linux(6, 6),
        is: |it| is_arithmetic(it) && it.operation() == MOVE && it.is_by_register() && it.off != 0,
    },
    Kind {
        name: "signed division or modulo (instruction set v4)",
        since: Linux(6, 6),
        is: |it| is_arithmetic(it) && matches!(it.operation(), DIVIDE | MODULO) && it.off != 0,
    },
    Kind {
        name: "unconditional byte swap (instruction set v4)",
        since: Linux(6, 6),
        is: |it| it.class() == class::ALU64 && it.operation() == SWAP,
    },
    Kind {
        name: "jump over a distance of 32 bits (instruction set v4)",
        since: Linux(6, 6),
        is: |it| it.class() == class::JMP32 && it.operation() == JUMP,
    },
    Kind {
        name: "may_goto",
        since: Linux(6, 9),
        is: |it| it.class() == class::JMP && it.operation() == MAY_GOTO,
    },
    Kind {
        name: "load-acquire or store-release",
        since: Linux(6, 15),
        is: |it| is_atomic(it) && matches!(it.imm, LOAD_ACQUIRE | STORE_RELEASE),
    },
];

fn is_atomic(it: Instruction) -> bool {
    it.class() == class::STX && it.code & MODE == ATOMIC
}

fn is_arithmetic(it: Instruction) -> bool {
    matches!(it.class(), class::ALU | class::ALU64)
}

/// Checks an object for [`OLDEST`].
///
/// # Errors
/// When that kernel would refuse it: everything that was found.
pub(super) fn check(object: &[u8]) -> Result<()> {
    let contents = program::contents(object)?;
    let maps = contents.maps.iter().filter_map(|(name, kind)| {
        let since = since(MAPS, i32::try_from(*kind).unwrap_or(i32::MAX));
        too_new(since).map(|since| format!("map {name}: its type {kind} needs {since}"))
    });
    let mut found: Vec<String> = maps.collect();
    for program in &contents.programs {
        let of_program = refusals(program).into_iter();
        found.extend(of_program.map(|what| format!("program {}: {what}", program.name)));
    }
    if !found.is_empty() {
        bail!(
            "{OLDEST}, the oldest kernel that README.md promises, would refuse the BPF object:\n  {}",
            found.join("\n  ")
        );
    }
    Ok(())
}

/// Why [`OLDEST`] would refuse a program.
fn refusals(program: &Program) -> Vec<String> {
    let mut found = Vec::new();
    let mut is_second_half = false;
    for (at, instruction) in program.instructions.iter().enumerate() {
        if !is_second_half && let Some(what) = too_new_here(*instruction) {
            found.push(format!("insn {at}: {what}"));
        }
        is_second_half = !is_second_half && instruction.is_wide();
    }
    found.extend(flow::check(program).err().map(|it| it.to_string()));
    found.extend(frames::check(program).err());
    found
}

fn too_new_here(instruction: Instruction) -> Option<String> {
    match instruction.flow() {
        Flow::Helper(number) => {
            let since = too_new(since(HELPERS, number))?;
            return Some(format!("helper {number} needs {since}"));
        }
        // The agent's loader resolves none.
        Flow::Kfunc => return Some("a function of the kernel is called".to_owned()),
        Flow::CallRegister => return Some("a function is called by a register".to_owned()),
        _ => {}
    }
    let kind = KINDS
        .iter()
        .filter(|kind| kind.since > OLDEST)
        .find(|kind| (kind.is)(instruction))?;
    Some(format!("{} needs {}", kind.name, kind.since))
}

/// The kernel that brought a number; `None` when no kernel of the table has it.
fn since(table: &[(i32, Linux)], number: i32) -> Option<Linux> {
    let row = table.iter().find(|(last, _)| number <= *last);
    row.map(|(_, since)| *since)
}

/// In words, what is newer than [`OLDEST`].
fn too_new(since: Option<Linux>) -> Option<String> {
    match since {
        Some(since) if since <= OLDEST => None,
        Some(since) => Some(since.to_string()),
        None => Some("a kernel that is newer than any known here".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn insn(code: u8, src: u8, off: i16, imm: i32) -> Instruction {
        Instruction {
            code,
            dst: 0,
            src,
            off,
            imm,
        }
    }

    const EXIT: Instruction = insn(0x95, 0, 0, 0);

    #[test]
    fn the_committed_object_is_taken() {
        let object = std::fs::read(crate::ebpf::root().join(crate::ebpf::OBJECT)).unwrap();
        check(&object).unwrap();
        let contents = program::contents(&object).unwrap();
        let names: Vec<_> = contents
            .programs
            .iter()
            .map(|it| it.name.as_str())
            .collect();
        assert_eq!(
            names,
            [
                "external_ingress",
                "pod_ingress",
                "probe_egress",
                "probe_ingress",
                "underlay_egress",
                "underlay_ingress"
            ]
        );
        assert!(contents.maps.len() >= 16);
        // With the four that it calls and `memset` behind it.
        let egress = &contents.programs[4];
        assert_eq!(egress.functions().len(), 6, "{egress:?}");
        assert!(check(b"no object").is_err());
    }

    #[test]
    fn what_came_after_6_1_is_named_with_its_kernel() {
        for (instruction, words) in [
            (
                insn(0x91, 0, 0, 0),
                "load with sign extension (instruction set v4) needs Linux 6.6",
            ),
            (insn(0xbf, 1, 8, 0), "move with sign extension"),
            (insn(0x37, 0, 1, 3), "signed division or modulo"),
            (insn(0xd7, 0, 0, 16), "unconditional byte swap"),
            (insn(0x06, 0, 0, 0), "jump over a distance of 32 bits"),
            (insn(0xe5, 0, 0, 0), "may_goto needs Linux 6.9"),
            (
                insn(0xdb, 0, 0, 0x100),
                "load-acquire or store-release needs Linux 6.15",
            ),
            (insn(0x85, 0, 0, 211), "helper 211 needs Linux 6.2"),
            (
                insn(0x85, 0, 0, 212),
                "helper 212 needs a kernel that is newer",
            ),
            (insn(0x85, 2, 0, 7), "a function of the kernel is called"),
            (insn(0x8d, 0, 0, 0), "a function is called by a register"),
        ] {
            let found = too_new_here(instruction).unwrap_or_default();
            assert!(found.contains(words), "{found:?}, not {words:?}");
        }
    }

    #[test]
    fn what_6_1_has_passes() {
        for instruction in [
            // A load, a move, an unsigned division, a swap to big endian, `lock add`, `xchg`, a 32-bit branch.
            insn(0x61, 0, 4, 0),
            insn(0xbf, 1, 0, 0),
            insn(0x37, 0, 0, 3),
            insn(0xdc, 0, 0, 16),
            insn(0xdb, 0, 0, 0),
            insn(0xdb, 0, 0, 0xe1),
            insn(0x16, 0, 2, 0),
            // bpf_ktime_get_coarse_ns (5.11) and bpf_user_ringbuf_drain (6.1).
            insn(0x85, 0, 0, 160),
            insn(0x85, 0, 0, 209),
            EXIT,
        ] {
            assert_eq!(too_new_here(instruction), None, "{instruction:?}");
        }
    }

    #[test]
    fn everything_that_is_wrong_is_reported_with_its_place() {
        let program = Program {
            name: "crafted".to_owned(),
            instructions: vec![
                insn(0x85, 0, 0, 211),
                // `goto` into a loop whose body stands in front of its head.
                insn(0x05, 0, 1, 0),
                insn(0xb7, 0, 0, 0),
                insn(0x15, 0, -2, 0),
                EXIT,
            ],
        };
        assert_eq!(
            refusals(&program),
            [
                "insn 0: helper 211 needs Linux 6.2",
                "back-edge from insn 2 to 3"
            ]
        );
    }

    #[test]
    fn the_upper_half_of_a_number_is_no_instruction() {
        // Its bytes would read as `may_goto`.
        let program = Program {
            name: "crafted".to_owned(),
            instructions: vec![insn(0x18, 0, 0, 1), insn(0xe5, 0, 0, 0), EXIT],
        };
        let words = refusals(&program).join(" ");
        assert!(!words.contains("may_goto"), "{words}");
    }
}
