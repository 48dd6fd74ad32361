//! The programs of an object as the kernel gets them: decoded, each with the functions that it calls behind it.

use std::{collections::HashSet, fmt};

use anyhow::{Context as _, Result};
use aya_obj::{Object, generated::bpf_insn};

/// Instruction classes (linux/bpf_common.h and linux/bpf.h).
pub(super) mod class {
    pub(in crate::ebpf) const LDX: u8 = 0x01;
    pub(in crate::ebpf) const ST: u8 = 0x02;
    pub(in crate::ebpf) const STX: u8 = 0x03;
    pub(in crate::ebpf) const ALU: u8 = 0x04;
    pub(in crate::ebpf) const JMP: u8 = 0x05;
    pub(in crate::ebpf) const JMP32: u8 = 0x06;
    pub(in crate::ebpf) const ALU64: u8 = 0x07;
}

/// Opcodes: of jumps the upper four bits, of a load of 64 bits all.
const JA: u8 = 0x00;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
const LOAD_IMM64: u8 = 0x18;

/// Bit of an opcode: the operand is a register.
const BY_REGISTER: u8 = 0x08;

/// BPF_PSEUDO_CALL, BPF_PSEUDO_KFUNC_CALL and BPF_PSEUDO_FUNC of linux/bpf.h, which stand in the field of the source register.
const PSEUDO_CALL: u8 = 1;
const PSEUDO_KFUNC_CALL: u8 = 2;
const PSEUDO_FUNC: u8 = 4;

/// `struct bpf_insn` of linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) code: u8,
    pub(super) dst: u8,
    pub(super) src: u8,
    pub(super) off: i16,
    pub(super) imm: i32,
}

/// Where control goes from an instruction; distances count from the next instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// To the next instruction.
    Next,
    /// There.
    Jump(i64),
    /// There or to the next.
    Branch(i64),
    /// To a helper, and back.
    Helper(i32),
    /// To a function of the program, and back.
    Call(i64),
    /// To a function of the kernel, and back.
    Kfunc,
    /// To the address in a register, and back.
    CallRegister,
    /// To the next; a function of the program is named, for a helper that calls it.
    Function(i64),
    /// Out of the function.
    Exit,
}

impl Instruction {
    /// The lower three bits of the opcode.
    pub(super) const fn class(self) -> u8 {
        self.code & 0x07
    }

    /// The upper four bits of the opcode of an arithmetic instruction or jump.
    pub(super) const fn operation(self) -> u8 {
        self.code & 0xf0
    }

    /// Whether the operand is a register.
    pub(super) const fn is_by_register(self) -> bool {
        self.code & BY_REGISTER != 0
    }

    /// Where control goes.
    pub(super) fn flow(self) -> Flow {
        if self.code == LOAD_IMM64 && self.src == PSEUDO_FUNC {
            return Flow::Function(self.imm.into());
        }
        if !matches!(self.class(), class::JMP | class::JMP32) {
            return Flow::Next;
        }
        match (self.operation(), self.src) {
            (EXIT, _) => Flow::Exit,
            (CALL, _) if self.is_by_register() => Flow::CallRegister,
            (CALL, PSEUDO_CALL) => Flow::Call(self.imm.into()),
            (CALL, PSEUDO_KFUNC_CALL) => Flow::Kfunc,
            (CALL, _) => Flow::Helper(self.imm),
            (JA, _) => Flow::Jump(self.off.into()),
            _ => Flow::Branch(self.off.into()),
        }
    }

    /// Whether the next eight bytes are the upper half of this instruction's number.
    pub(super) const fn is_wide(self) -> bool {
        self.code == LOAD_IMM64
    }
}

impl From<bpf_insn> for Instruction {
    fn from(insn: bpf_insn) -> Self {
        Self {
            code: insn.code,
            dst: insn.dst_reg(),
            src: insn.src_reg(),
            off: insn.off,
            imm: insn.imm,
        }
    }
}

/// A program with the functions that it calls.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) instructions: Vec<Instruction>,
}

impl Program {
    /// Where the functions begin, in ascending order: the program itself at 0, and whatever is called or named.
    pub(super) fn functions(&self) -> Vec<usize> {
        let called = self.instructions.iter().enumerate().filter_map(|(at, it)| {
            let (Flow::Call(distance) | Flow::Function(distance)) = it.flow() else {
                return None;
            };
            target(at, distance, self.instructions.len())
        });
        let mut starts: Vec<usize> = called.chain([0]).collect();
        starts.sort_unstable();
        starts.dedup();
        starts
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.instructions.len())
    }
}

/// The instruction that a distance leads to, if the program has it.
pub(super) fn target(at: usize, distance: i64, length: usize) -> Option<usize> {
    let target = i64::try_from(at).ok()? + 1 + distance;
    usize::try_from(target).ok().filter(|it| *it < length)
}

/// What of an object the kernel gets.
pub(super) struct Contents {
    pub(super) programs: Vec<Program>,
    /// The maps: name and type.
    pub(super) maps: Vec<(String, u32)>,
}

/// Takes an object apart as the agent's loader does, so that instructions have the numbers that the kernel speaks of.
///
/// # Errors
/// When it is no BPF object, or one of its calls leads nowhere.
pub(super) fn contents(object: &[u8]) -> Result<Contents> {
    let mut object = Object::parse(object).context("not a BPF object")?;
    let sections: HashSet<usize> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    object
        .relocate_calls(&sections)
        .context("a call of a BPF program leads nowhere")?;
    let mut programs = Vec::new();
    for (name, program) in &object.programs {
        let function = object.functions.get(&program.function_key());
        let function = function.with_context(|| format!("the program {name} has no code"))?;
        programs.push(Program {
            name: name.clone(),
            instructions: function
                .instructions
                .iter()
                .map(|it| (*it).into())
                .collect(),
        });
    }
    programs.sort_by(|one, other| one.name.cmp(&other.name));
    let maps = object.maps.iter();
    Ok(Contents {
        programs,
        maps: maps
            .map(|(name, map)| (name.clone(), map.map_type()))
            .collect(),
    })
}
