"""The tiny guest that proves an accelerator, as a boot sector. For `accel`; a test assembles the source again.

It does what half-working KVMs have failed at: the firmware starts it from a virtio disk, it makes a BIOS disk call,
waits for timer interrupts, switches to 64-bit mode with paging and computes with SSE in memory. Only if the result is
right it ends QEMU through the isa-debug-exit device.
"""

from __future__ import annotations

SUCCESS_STATUS = 0x21  # isa-debug-exit: (0x10 << 1) | 1
IMAGE_BYTES = 1 << 20  # SeaBIOS does not start from a disk of one sector

ASSEMBLY = """
.code16
.globl _start
_start:
  cli
  xorw %ax,%ax
  movw %ax,%ds
  movw %ax,%es
  movw %ax,%ss
  movw $0x7c00,%sp
  cld
  movb $0x41,%ah        /* EDD: where kernels hung on a half-working KVM */
  movw $0x55aa,%bx
  int $0x13
  movl 0x46c,%eax       /* BIOS tick count: three timer interrupts must arrive */
  addl $3,%eax
1: sti
  hlt
  cmpl %eax,0x46c
  jb 1b
  cli
  movl $0x80000000,%eax
  cpuid
  /* page tables at 0x1000: 1 GiB identity with 2 MiB pages */
  movl $0x1000,%edi
  movl %edi,%cr3
  xorl %eax,%eax
  movw $0xc00,%cx
  rep stosl
  movl $0x2003,0x1000
  movl $0x3003,0x2000
  movw $0x3000,%di
  movl $0x83,%eax
2: movl %eax,(%di)
  addl $0x200000,%eax
  addw $8,%di
  cmpw $0x4000,%di
  jb 2b
  movl $0x620,%eax      /* CR4: PAE, OSFXSR, OSXMMEXCPT */
  movl %eax,%cr4
  movl $0xc0000080,%ecx
  rdmsr
  orw $0x100,%ax
  wrmsr
  lgdtl gdtr
  movl %cr0,%eax
  andb $0xfb,%al        /* EM off */
  orl $0x80000001,%eax
  movl %eax,%cr0
  ljmpl $8,$long
.code64
long:
  movw $16,%ax
  movw %ax,%ds
  movw %ax,%ss
  movl $1000000,%ecx    /* computes, with SSE and memory writes, for some ms */
  movl $0x1000000,%edi
  pxor %xmm0,%xmm0
  pcmpeqd %xmm1,%xmm1
3: psubd %xmm1,%xmm0
  movdqu %xmm0,(%rdi)
  addl $64,%edi
  cmpl $0x2000000,%edi
  jb 4f
  movl $0x1000000,%edi
4: decl %ecx
  jnz 3b
  movd %xmm0,%eax
  cmpl $1000000,%eax
  jne 5f
  movl $0x10,%eax
  /* a page fault free, right result: exit status 0x21 */
  outl %eax,$0xf4
5: cli
  hlt
  jmp 5b
gdtr: .word 23
  .long gdt
.align 8
gdt: .quad 0
  .quad 0x00209a0000000000
  .quad 0x0000920000000000
.org 510
.word 0xaa55
"""

_CODE = (
    "fa31c08ed88ec08ed0bc007cfcb441bbaa55cd1366a16c046683c003fbf46639066c0472f7fa66b8000000800fa266bf0010"
    "00000f22df6631c0b9000c66f3ab66c70600100320000066c706002003300000bf003066b883000000668905660500002000"
    "83c70881ff004072ee66b8200600000f22e066b9800000c00f320d00010f30660f0116eb7c0f20c024fb660d010000800f22"
    "c066ea9f7c0000080066b810008ed88ed0b940420f00bf00000001660fefc0660f76c9660ffac1f30f7f0783c74081ff0000"
    "00027205bf00000001ffc975e4660f7ec03d40420f007507b810000000e7f4faf4ebfc1700f87c00008db426000000000000"
    "00000000000000000000009a2000000000000092"
)


def boot_sector() -> bytes:
    """The 512 bytes of the sector."""
    return bytes.fromhex(_CODE).ljust(510, b"\0") + b"\x55\xaa"
