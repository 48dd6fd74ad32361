//! The programs over the maps that an agent has pinned, to be run on crafted frames (BPF_PROG_TEST_RUN).

use std::{fs, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, TestRun as _, TestRunOptions, TestRunResult},
};

/// TC_ACT_UNSPEC: other programs and the kernel go on.
pub(crate) const NEXT: i32 = -1;

static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../../ebpf/proxy-nsmgr.bpf.o");

/// The object of the agent, loaded a second time: by its bytes the same programs, by the pins the same maps.
pub(crate) struct Programs(Ebpf);

/// What `struct __sk_buff` says of a frame that stands for several packets of the wire; all zero for a plain one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gso {
    /// Packets.
    pub(crate) segs: u32,
    /// Inner payload bytes of each.
    pub(crate) size: u32,
}

// `struct __sk_buff` of the kernel's stable interface (linux/bpf.h): its size, and where the fields are that we set.
const SK_BUFF: usize = 192;
const SK_BUFF_IFINDEX: usize = 40;
const SK_BUFF_GSO_SEGS: usize = 164;
const SK_BUFF_GSO_SIZE: usize = 176;

impl Programs {
    /// Loads the programs over the maps that are pinned in `pin_dir`.
    pub(crate) fn over(pin_dir: &Path) -> Self {
        let mut loader = EbpfLoader::new();
        let pins = fs::read_dir(pin_dir).expect("the pin directory");
        let names: Vec<String> = pins
            .map(|pin| pin.expect("a pin").file_name())
            .map(|name| name.into_string().expect("UTF-8"))
            .collect();
        for map in names.iter().filter(|name| !name.contains("link_")) {
            loader.map_pin_path(map, pin_dir.join(map));
        }
        let mut ebpf = loader.load(OBJECT).expect("the object");
        for (name, program) in ebpf.programs_mut() {
            let program: &mut SchedClassifier = program.try_into().expect("a classifier");
            program
                .load()
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        Self(ebpf)
    }

    /// A program by its name in the object.
    pub(crate) fn get(&self, name: &str) -> &SchedClassifier {
        let program = self.0.program(name).expect("a program of this name");
        program.try_into().expect("a classifier")
    }

    /// Runs a program on a frame that is never sent, `repeat` times: what came of it, and the frame as the program left it. Maps change as
    /// by real traffic.
    pub(crate) fn run(
        &self,
        name: &str,
        frame: &[u8],
        gso: Gso,
        repeat: u32,
    ) -> (TestRunResult, Vec<u8>) {
        self.run_on(name, 0, frame, gso, repeat)
    }

    /// Likewise, on a frame that came in by the interface with this index; 0: the loopback.
    pub(crate) fn run_on(
        &self,
        name: &str,
        interface: u32,
        frame: &[u8],
        gso: Gso,
        repeat: u32,
    ) -> (TestRunResult, Vec<u8>) {
        let mut context = [0; SK_BUFF];
        context[SK_BUFF_IFINDEX..][..4].copy_from_slice(&interface.to_ne_bytes());
        context[SK_BUFF_GSO_SEGS..][..4].copy_from_slice(&gso.segs.to_ne_bytes());
        context[SK_BUFF_GSO_SIZE..][..4].copy_from_slice(&gso.size.to_ne_bytes());
        // Encapsulation makes it longer.
        let mut output = vec![0; frame.len() + 64];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut output),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::new()
        };
        let result = self.get(name).test_run(options).expect("a test run");
        output.truncate(result.data_size_out as usize);
        (result, output)
    }
}
