//! The check of control flow that kernels from 5.3 to 6.6 make before they look at a program's meaning (`check_cfg`, `push_insn` and
//! `visit_insn` in kernel/bpf/verifier.c of Linux 5.15 and 6.1).
//!
//! The kernel walks the instructions depth first, at each the fall-through before the branch. An edge that leads to an instruction whose
//! walk has not ended closes a loop. Since 5.3 loops are allowed, but the check is made for jumps only: the back-edge may leave a `goto`
//! or a conditional jump, and not an instruction that falls through to the next, be it arithmetic, a load or a call. Which edge closes a
//! loop depends on where the compiler puts its blocks: when the end of the body stands in front of its head, and the loop is entered by a
//! jump to the head, the body falls through to an instruction that is being walked. The program is then refused with `back-edge from
//! insn A to B`, though the loop is bounded. Linux 6.7 (commit 10e14e9652bf) ended that: every back-edge is left to the later check.
//!
//! The same walk refuses instructions that nothing leads to, and jumps out of the program; `check_subprogs`, before it, jumps from one
//! function into another, and functions that do not end in `exit` or `goto`.

use std::fmt;

use super::program::{Flow, Program, target};

/// Why the kernel refuses a program, in its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A loop is closed by falling through.
    BackEdge { from: usize, to: usize },
    /// A jump or a call leads out of the program.
    OutOfRange { from: usize },
    /// A jump leads out of its function.
    OutOfFunction { from: usize },
    /// A function ends in another instruction.
    NoEnd { at: usize },
    /// Nothing leads to an instruction.
    Unreachable { at: usize },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BackEdge { from, to } => write!(f, "back-edge from insn {from} to {to}"),
            Self::OutOfRange { from } => write!(f, "jump out of range from insn {from}"),
            Self::OutOfFunction { from } => write!(f, "jump out of function from insn {from}"),
            Self::NoEnd { at } => write!(f, "last insn {at} of a function is not an exit or jmp"),
            Self::Unreachable { at } => write!(f, "unreachable insn {at}"),
        }
    }
}

/// Checks a program as kernels before 6.7 do.
pub(super) fn check(program: &Program) -> Result<(), Refusal> {
    check_functions(program)?;
    Walk::new(program).run()
}

fn check_functions(program: &Program) -> Result<(), Refusal> {
    let length = program.instructions.len();
    let starts = program.functions();
    let ends = starts.iter().skip(1).copied().chain([length]);
    for (start, end) in starts.iter().copied().zip(ends) {
        for at in start..end {
            let flow = program.instructions[at].flow();
            let (Flow::Jump(distance) | Flow::Branch(distance)) = flow else {
                continue;
            };
            let to = target(at, distance, length).ok_or(Refusal::OutOfRange { from: at })?;
            if !(start..end).contains(&to) {
                return Err(Refusal::OutOfFunction { from: at });
            }
        }
        let last = end.saturating_sub(1);
        if !matches!(
            program.instructions.get(last).map(|it| it.flow()),
            Some(Flow::Exit | Flow::Jump(_))
        ) {
            return Err(Refusal::NoEnd { at: last });
        }
    }
    Ok(())
}

/// How far the walk of an instruction is. The order matters: an edge is followed once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    New,
    Discovered,
    FellThrough,
    Branched,
    Explored,
}

/// An edge of an instruction.
#[derive(Clone, Copy)]
struct Edge {
    /// What the walk of the instruction has come to when this edge was followed.
    reaches: Progress,
    distance: i64,
    /// Whether it may close a loop.
    may_loop: bool,
}

struct Walk<'a> {
    program: &'a Program,
    progress: Vec<Progress>,
    stack: Vec<usize>,
}

impl<'a> Walk<'a> {
    fn new(program: &'a Program) -> Self {
        let mut progress = vec![Progress::New; program.instructions.len()];
        if let Some(first) = progress.first_mut() {
            *first = Progress::Discovered;
        }
        Self {
            program,
            progress,
            stack: vec![0],
        }
    }

    fn run(mut self) -> Result<(), Refusal> {
        while let Some(at) = self.stack.last().copied() {
            if !self.goes_deeper(at)? {
                self.progress[at] = Progress::Explored;
                self.stack.pop();
            }
        }
        let unexplored = self
            .progress
            .iter()
            .position(|it| *it != Progress::Explored);
        unexplored.map_or(Ok(()), |at| Err(Refusal::Unreachable { at }))
    }

    /// Follows the first edge that leads to a new instruction; whether there is one.
    fn goes_deeper(&mut self, at: usize) -> Result<bool, Refusal> {
        for edge in edges(self.program.instructions[at].flow())
            .into_iter()
            .flatten()
        {
            if self.progress[at] >= edge.reaches {
                continue;
            }
            let to = target(at, edge.distance, self.progress.len());
            let to = to.ok_or(Refusal::OutOfRange { from: at })?;
            match self.progress[to] {
                Progress::New => {
                    self.progress[at] = edge.reaches;
                    self.progress[to] = Progress::Discovered;
                    self.stack.push(to);
                    return Ok(true);
                }
                Progress::Explored => self.progress[at] = edge.reaches,
                // Being walked: a loop. The kernel leaves such an edge unlabelled.
                _ if edge.may_loop => {}
                _ => return Err(Refusal::BackEdge { from: at, to }),
            }
        }
        Ok(false)
    }
}

/// The edges of an instruction in the order in which they are followed.
fn edges(flow: Flow) -> [Option<Edge>; 2] {
    let falls = |distance, may_loop| {
        Some(Edge {
            reaches: Progress::FellThrough,
            distance,
            may_loop,
        })
    };
    let branches = |distance, may_loop| {
        Some(Edge {
            reaches: Progress::Branched,
            distance,
            may_loop,
        })
    };
    match flow {
        Flow::Exit => [None, None],
        Flow::Next | Flow::Helper(_) | Flow::Kfunc | Flow::CallRegister => [falls(0, false), None],
        Flow::Jump(distance) => [falls(distance, true), None],
        Flow::Branch(distance) => [falls(0, true), branches(distance, true)],
        Flow::Call(distance) => [falls(0, false), branches(distance, false)],
        Flow::Function(distance) => [falls(0, false), branches(distance, true)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ebpf::program::Instruction;

    const fn insn(code: u8, src: u8, off: i16, imm: i32) -> Instruction {
        Instruction {
            code,
            dst: 0,
            src,
            off,
            imm,
        }
    }

    /// `r0 = 0`.
    const SET: Instruction = insn(0xb7, 0, 0, 0);
    const EXIT: Instruction = insn(0x95, 0, 0, 0);

    const fn goto(off: i16) -> Instruction {
        insn(0x05, 0, off, 0)
    }

    /// `if r0 == 0 goto`.
    const fn branch(off: i16) -> Instruction {
        insn(0x15, 0, off, 0)
    }

    const fn call(distance: i32) -> Instruction {
        insn(0x85, 1, 0, distance)
    }

    fn checked(instructions: &[Instruction]) -> Result<(), Refusal> {
        check(&Program {
            name: "crafted".to_owned(),
            instructions: instructions.to_vec(),
        })
    }

    /// What Linux 6.1.192 said of these two, loaded by the agent of the commit before the loop was written out.
    #[test]
    fn it_refuses_what_6_1_refused_in_the_same_words() {
        for (name, stream, words) in [
            (
                "underlay_egress",
                &include_bytes!("fixtures/underlay_egress.insns")[..],
                "back-edge from insn 1362 to 1363",
            ),
            (
                "underlay_ingress",
                include_bytes!("fixtures/underlay_ingress.insns"),
                "back-edge from insn 1917 to 1918",
            ),
        ] {
            let (chunks, _) = stream.as_chunks::<8>();
            let decode = |&[code, registers, a, b, c, d, e, f]: &[u8; 8]| Instruction {
                code,
                dst: registers & 0x0f,
                src: registers >> 4,
                off: i16::from_le_bytes([a, b]),
                imm: i32::from_le_bytes([c, d, e, f]),
            };
            let program = Program {
                name: name.to_owned(),
                instructions: chunks.iter().map(decode).collect(),
            };
            assert_eq!(check(&program).unwrap_err().to_string(), words);
        }
    }

    #[test]
    fn a_loop_that_is_closed_by_a_jump_passes() {
        assert_eq!(checked(&[SET, SET, branch(-2), EXIT]), Ok(()));
        assert_eq!(checked(&[SET, branch(2), SET, goto(-3), EXIT]), Ok(()));
    }

    #[test]
    fn a_loop_that_is_closed_by_falling_through_does_not() {
        // Entered at 2; the body at 1 stands in front of its head and falls through to it.
        let looped = [goto(1), SET, branch(-2), EXIT];
        let refusal = Refusal::BackEdge { from: 1, to: 2 };
        assert_eq!(checked(&looped), Err(refusal));
        assert_eq!(checked(&[goto(1), goto(0), branch(-2), EXIT]), Ok(()));
        // By a call.
        let helper = insn(0x85, 0, 0, 5);
        assert_eq!(checked(&[goto(1), helper, branch(-2), EXIT]), Err(refusal));
    }

    #[test]
    fn functions_are_walked_and_must_not_recurse() {
        let called = [call(1), EXIT, SET, EXIT];
        assert_eq!(checked(&called), Ok(()));
        let looped = [call(1), EXIT, goto(1), SET, branch(-2), EXIT];
        assert_eq!(checked(&looped), Err(Refusal::BackEdge { from: 3, to: 4 }));
        let recursive = [call(1), EXIT, call(-1), EXIT];
        assert_eq!(
            checked(&recursive),
            Err(Refusal::BackEdge { from: 2, to: 2 })
        );
    }

    #[test]
    fn what_leads_nowhere_is_refused() {
        assert_eq!(
            checked(&[goto(1), SET, EXIT]),
            Err(Refusal::Unreachable { at: 1 })
        );
        assert_eq!(
            checked(&[goto(7), EXIT]),
            Err(Refusal::OutOfRange { from: 0 })
        );
        assert_eq!(
            checked(&[call(9), EXIT]),
            Err(Refusal::OutOfRange { from: 0 })
        );
        assert_eq!(
            checked(&[call(2), branch(1), EXIT, SET, EXIT]),
            Err(Refusal::OutOfFunction { from: 1 })
        );
        assert_eq!(checked(&[EXIT, SET]), Err(Refusal::NoEnd { at: 1 }));
        assert_eq!(checked(&[]), Err(Refusal::NoEnd { at: 0 }));
    }
}
