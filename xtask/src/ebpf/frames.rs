//! The stack that a program takes: frames of functions that call each other share 512 bytes, and at most 8 of them nest
//! (`check_max_stack_depth` in kernel/bpf/verifier.c; MAX_BPF_STACK, MAX_CALL_FRAMES).
//!
//! The kernel takes the deepest byte that a walk of the program touches. Here it is the deepest that an instruction names, which is the
//! same for what LLVM makes: it addresses the stack by the frame pointer and a number, or by a copy of the pointer that a number is
//! added to at once.

use std::collections::BTreeMap;

use super::program::{Flow, Instruction, Program, class, target};

/// Bytes of stack of all frames together.
const STACK: u32 = 512;

/// Frames that nest.
const FRAMES: usize = 8;

/// A frame takes a multiple of this, and this at least. Kernels since 6.8 round to 16 where they compile programs.
const ROUNDED_TO: u32 = 32;

/// The register that holds the frame pointer.
const FRAME_POINTER: u8 = 10;

/// `dst = src` and `dst += imm` of 64 bits.
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;

/// Whether the deepest chain of calls fits, else how deep it is.
pub(super) fn check(program: &Program) -> Result<(), String> {
    let functions = functions(program);
    let mut deepest = (0, 0);
    descend(&functions, 0, (0, 0), &mut deepest);
    match deepest {
        (_, frames) if frames > FRAMES => Err(format!("calls nest deeper than {FRAMES} frames")),
        (bytes, frames) if bytes > STACK => Err(format!(
            "{frames} nested frames take {bytes} bytes of stack, of {STACK}"
        )),
        _ => Ok(()),
    }
}

struct Function {
    frame: u32,
    calls: Vec<usize>,
}

/// The functions by their first instruction.
fn functions(program: &Program) -> BTreeMap<usize, Function> {
    let length = program.instructions.len();
    let starts = program.functions();
    let ends = starts.iter().skip(1).copied().chain([length]);
    let bodies = starts.iter().copied().zip(ends);
    bodies
        .map(|(start, end)| {
            let body = &program.instructions[start..end];
            let calls = body
                .iter()
                .enumerate()
                .filter_map(|(at, it)| match it.flow() {
                    Flow::Call(distance) | Flow::Function(distance) => {
                        target(start + at, distance, length)
                    }
                    _ => None,
                });
            let function = Function {
                frame: frame(body).max(1).next_multiple_of(ROUNDED_TO),
                calls: calls.collect(),
            };
            (start, function)
        })
        .collect()
}

/// The deepest byte below the frame pointer that the instructions name.
fn frame(body: &[Instruction]) -> u32 {
    let named = body.iter().map(|it| match it.class() {
        class::LDX if it.src == FRAME_POINTER => it.off.into(),
        class::ST | class::STX if it.dst == FRAME_POINTER => it.off.into(),
        _ => 0,
    });
    let added = body.windows(2).map(|pair| match pair {
        [copy, add]
            if copy.code == MOVE
                && copy.src == FRAME_POINTER
                && add.code == ADD
                && add.dst == copy.dst =>
        {
            add.imm
        }
        _ => 0,
    });
    let deepest = named.chain(added).min().unwrap_or(0).min(0);
    deepest.unsigned_abs()
}

/// Follows the calls of a function; `deepest` becomes the most bytes, and the most frames, that were met. No deeper than one frame too
/// many: recursion would have no end.
fn descend(
    functions: &BTreeMap<usize, Function>,
    start: usize,
    (bytes, frames): (u32, usize),
    deepest: &mut (u32, usize),
) {
    let Some(function) = functions.get(&start) else {
        return;
    };
    let here = (bytes + function.frame, frames + 1);
    *deepest = (deepest.0.max(here.0), deepest.1.max(here.1));
    if here.1 > FRAMES {
        return;
    }
    for called in &function.calls {
        descend(functions, *called, here, deepest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `*(u64 *)(r10 + off) = r0`.
    const fn store(off: i16) -> Instruction {
        Instruction {
            code: 0x7b,
            dst: FRAME_POINTER,
            src: 0,
            off,
            imm: 0,
        }
    }

    const fn insn(code: u8, src: u8, imm: i32) -> Instruction {
        Instruction {
            code,
            dst: 0,
            src,
            off: 0,
            imm,
        }
    }

    const EXIT: Instruction = insn(0x95, 0, 0);

    fn checked(instructions: Vec<Instruction>) -> Result<(), String> {
        check(&Program {
            name: "crafted".to_owned(),
            instructions,
        })
    }

    #[test]
    fn frames_of_a_chain_of_calls_are_added() {
        let call = insn(0x85, 1, 2);
        assert_eq!(
            checked(vec![store(-256), call, store(-8), EXIT, store(-256), EXIT]),
            Ok(())
        );
        let error = checked(vec![store(-257), call, store(-8), EXIT, store(-256), EXIT]);
        assert_eq!(
            error,
            Err("2 nested frames take 544 bytes of stack, of 512".to_owned())
        );
    }

    #[test]
    fn memory_that_a_helper_gets_counts() {
        let copied = [insn(MOVE, FRAME_POINTER, 0), insn(ADD, 0, -513), EXIT];
        assert_eq!(
            checked(copied.to_vec()),
            Err("1 nested frames take 544 bytes of stack, of 512".to_owned())
        );
    }

    #[test]
    fn eight_frames_nest_and_nine_do_not() {
        // Each function calls the next.
        let chain = |functions: usize| {
            let body = |_| [insn(0x85, 1, 1), EXIT];
            let mut chain: Vec<Instruction> = (1..functions).flat_map(body).collect();
            chain.push(EXIT);
            chain
        };
        assert_eq!(checked(chain(8)), Ok(()));
        assert!(checked(chain(9)).unwrap_err().contains("nest"));
    }
}
