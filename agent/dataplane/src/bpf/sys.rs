//! The bpf(2) commands that the loader library lacks.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use nix::libc::{SYS_bpf, c_int, c_long, syscall};

// enum bpf_cmd of linux/bpf.h.
const BPF_OBJ_GET: c_int = 7;
const BPF_PROG_QUERY: c_int = 16;
const BPF_LINK_DETACH: c_int = 34;

/// Takes the program of a pinned link off its interface, at once. Only removing the pin would do so too, but later: the kernel
/// puts that off to a worker.
pub(super) fn detach_pinned_link(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // The part of `union bpf_attr` that BPF_OBJ_GET reads: pathname, bpf_fd and file_flags.
    let mut get: [u64; 2] = [path.as_ptr() as u64, 0];
    let fd = bpf(BPF_OBJ_GET, &mut get)?;
    // SAFETY: the kernel just made this descriptor for us, and nothing else has it.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    // Likewise for BPF_LINK_DETACH: link_fd.
    let mut detach: [u32; 1] = [link.as_raw_fd().cast_unsigned()];
    bpf(BPF_LINK_DETACH, &mut detach).map(drop)
}

/// The programs that a hook may hold: BPF_MPROG_MAX of the kernel.
const MOST_PROGRAMS: usize = 64;

/// The identifiers of the programs on a tcx hook, in the order in which they run.
///
/// The loader library opens each program to read its identifier, for which the kernel wants CAP_SYS_ADMIN. The identifiers alone are
/// given to whoever has CAP_NET_ADMIN.
pub(super) fn programs_on_tcx(ifindex: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    /// The part of `union bpf_attr` that BPF_PROG_QUERY reads and writes, whole: the kernel writes to its end whatever size it is given.
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        ifindex: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        padding: u32,
        program_attach_flags: u64,
        links: u64,
        link_attach_flags: u64,
        revision: u64,
    }
    let mut programs = [0_u32; MOST_PROGRAMS];
    let mut query = Query {
        ifindex,
        attach_type,
        programs: programs.as_mut_ptr() as u64,
        count: MOST_PROGRAMS as u32,
        ..Query::default()
    };
    bpf(BPF_PROG_QUERY, &mut query)?;
    let found = programs.get(..query.count as usize);
    Ok(found.unwrap_or_default().to_vec())
}

/// `attributes` is the part of `union bpf_attr` that the command reads and writes.
fn bpf<T>(command: c_int, attributes: &mut T) -> io::Result<c_int> {
    // SAFETY: the kernel reads as many bytes as we say there are, takes the rest of the union as zero, and writes no further back;
    // what pointers in it lead to outlives the call and has the length that stands beside.
    let result: c_long = unsafe {
        syscall(
            SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as c_int)
    }
}
