//! One virtual CPU in long mode that runs what an ordinary kernel needs at its very start: a counted loop, an
//! SSE2 instruction, a locked compare-and-exchange, `cpuid`, a reload of CR3 and a port write.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

const MEMORY: usize = 64 * 1024;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x500;
const CODE: u64 = 0x8000;
const STACK: u64 = 0x7000;
/// Scratch word for the compare-and-exchange.
const WORD: u32 = 0x9000;
const PORT: u16 = 0xf4;
const LOOPS: u32 = 10_000;
/// What the guest writes to [`PORT`] when each step gave what it should.
const GOOD: u8 = 0x2a;

/// Runs the virtual CPU to its port write.
///
/// # Errors
/// Which step did not work, in words.
pub(super) fn run() -> Result<(), String> {
    let kvm = Kvm::new().map_err(|error| format!("cannot open /dev/kvm: {error}"))?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(format!("/dev/kvm has API version {version}, not 12"));
    }
    let vm = kvm
        .create_vm()
        .map_err(|error| format!("cannot create a VM: {error}"))?;
    let memory = Memory::new()?;
    memory.fill();
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.address as u64,
    };
    // SAFETY: the mapping outlives the VM (declared before it is dropped, and the process leaves after this).
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| format!("cannot give a VM memory: {error}"))?;
    let mut vcpu = vm
        .create_vcpu(0)
        .map_err(|error| format!("cannot create a vCPU: {error}"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| format!("cannot read the supported cpuid: {error}"))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(|error| format!("cannot set a vCPU's cpuid: {error}"))?;
    enter_long_mode(&vcpu)?;
    loop {
        return match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [GOOD])) => Ok(()),
            Ok(VcpuExit::IoOut(PORT, data)) => Err(format!("a vCPU computed {data:?}, not [{GOOD}]")),
            Ok(exit) => Err(format!("a vCPU stopped unexpectedly: {exit:?}")),
            Err(error) if error.errno() == libc::EINTR => continue,
            Err(error) => Err(format!("a vCPU does not run: {error}")),
        };
    }
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), String> {
    let failed = |error: kvm_ioctls::Error| format!("cannot set a vCPU's registers: {error}");
    let mut special = vcpu.get_sregs().map_err(failed)?;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8,
        type_: 11,
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    special.cs = code;
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.gdt.base = GDT;
    special.gdt.limit = 23;
    special.cr3 = PML4;
    special.cr4 = 1 << 5 | 1 << 9 | 1 << 10; // PAE, OSFXSR, OSXMMEXCPT
    special.cr0 = 1 | 1 << 1 | 1 << 5 | 1 << 31; // PE, MP, NE, PG
    special.efer = 1 << 8 | 1 << 10; // LME, LMA
    vcpu.set_sregs(&special).map_err(failed)?;
    let general = kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&general).map_err(failed)
}

/// The guest's program. Each step leaves a part of the answer, so that a wrong result shows.
fn program() -> Vec<u8> {
    let mut code = Vec::new();
    let mut put = |bytes: &[u8]| code.extend_from_slice(bytes);
    put(&[0xb9]);
    put(&LOOPS.to_le_bytes()); // mov ecx, LOOPS
    put(&[0x31, 0xdb]); // xor ebx, ebx
    put(&[0xff, 0xc3]); // inc ebx
    put(&[0xff, 0xc9]); // dec ecx
    put(&[0x75, 0xfa]); // jnz to inc
    put(&[0x66, 0x0f, 0x6e, 0xc3]); // movd xmm0, ebx
    put(&[0x66, 0x0f, 0xfe, 0xc0]); // paddd xmm0, xmm0
    put(&[0x66, 0x0f, 0x7e, 0xc6]); // movd esi, xmm0: 2 * LOOPS
    put(&[0x31, 0xc0]); // xor eax, eax
    put(&[0x89, 0xf2]); // mov edx, esi
    put(&[0xf0, 0x0f, 0xb1, 0x14, 0x25]);
    put(&WORD.to_le_bytes()); // lock cmpxchg [WORD], edx
    put(&[0x8b, 0x3c, 0x25]);
    put(&WORD.to_le_bytes()); // mov edi, [WORD]
    put(&[0x31, 0xc0, 0x31, 0xc9]); // xor eax, eax; xor ecx, ecx
    put(&[0x0f, 0xa2]); // cpuid
    put(&[0x0f, 0x20, 0xd8]); // mov rax, cr3
    put(&[0x0f, 0x22, 0xd8]); // mov cr3, rax
    put(&[0x31, 0xc0]); // xor eax, eax
    put(&[0x81, 0xff]);
    put(&(2 * LOOPS).to_le_bytes()); // cmp edi, 2 * LOOPS
    put(&[0x75, 0x02]); // jne over the next
    put(&[0xb0, GOOD]); // mov al, GOOD
    put(&[0xe6, PORT as u8]); // out PORT, al
    put(&[0xf4]); // hlt
    code
}

/// The guest's memory: anonymous pages of this process.
struct Memory {
    address: *mut u8,
}

impl Memory {
    fn new() -> Result<Self, String> {
        // SAFETY: a fresh anonymous mapping, checked for failure below.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(format!(
                "cannot map guest memory: {}",
                std::io::Error::last_os_error()
            ));
        }
        Ok(Self {
            address: address.cast(),
        })
    }

    /// Page tables that map the first 2 MiB onto themselves, a flat GDT and the program.
    fn fill(&self) {
        let present_writable = 3;
        self.put(PML4, &(PDPT | present_writable).to_le_bytes());
        self.put(PDPT, &(DIRECTORY | present_writable).to_le_bytes());
        self.put(DIRECTORY, &(1u64 << 7 | present_writable).to_le_bytes());
        self.put(GDT + 8, &0x00af_9b00_0000_ffff_u64.to_le_bytes());
        self.put(GDT + 16, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
        self.put(CODE, &program());
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).expect("guest addresses are below 64 KiB");
        assert!(
            at + bytes.len() <= MEMORY,
            "guest memory is large enough for the constants above"
        );
        // SAFETY: inside the mapping by the check above; nobody else has the address.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.add(at), bytes.len()) }
    }
}
