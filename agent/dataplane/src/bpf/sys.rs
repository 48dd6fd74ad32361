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
const BPF_LINK_DETACH: c_int = 34;

/// Takes the program of a pinned link off its interface, at once. Only removing the pin would do so too, but later: the kernel
/// puts that off to a worker.
pub(super) fn detach_pinned_link(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // The part of `union bpf_attr` that BPF_OBJ_GET reads: pathname, bpf_fd and file_flags.
    let get: [u64; 2] = [path.as_ptr() as u64, 0];
    let fd = bpf(BPF_OBJ_GET, &get)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    // Likewise for BPF_LINK_DETACH: link_fd.
    let detach: [u32; 1] = [link.as_raw_fd().cast_unsigned()];
    bpf(BPF_LINK_DETACH, &detach).map(drop)
}

/// `attributes` is the part of `union bpf_attr` that the command reads.
fn bpf<T>(command: c_int, attributes: &T) -> io::Result<c_int> {
    // SAFETY: the kernel reads as many bytes as we say there are, takes the rest of the union as zero, and writes nothing back for
    // these commands; a path in it outlives the call.
    let result: c_long = unsafe {
        syscall(
            SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as c_int)
    }
}
