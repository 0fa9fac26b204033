"""A guest without an operating system: a boot sector that ticks, dirties memory and writes to its disk."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20

ASSEMBLY = """
.code16
.globl _start
_start:
  jmp main
  .org 4
pages: .long 0          /* offset 4: pages dirtied per tick */
dowrite: .byte 0        /* offset 8: 1 = write a sector per tick */
.org 16
dap: .byte 0x10,0
  .word 1
  .word 0x8000,0
lba: .long 2048,0
main:
  cli
  xorw %ax,%ax
  movw %ax,%ds
  movw %ax,%es
  movw %ax,%ss
  movw $0x7c00,%sp
  movb %dl,drive
loop:
  sti
  hlt
  cli
  incl 0x8000           /* heartbeat, also the sector's contents */
  pushw %ds
  lgdtl gdtr
  movl %cr0,%eax
  orb $1,%al
  movl %eax,%cr0
  movw $8,%bx
  movw %bx,%fs
  andb $0xfe,%al
  movl %eax,%cr0
  popw %ds
  movl $0x1000000,%edi
  movl pages,%ecx
  jecxz 2f
1: incl %fs:(%edi)
  addl $4096,%edi
  decl %ecx
  jnz 1b
2: sti
  cmpb $0,dowrite
  je 3f
  movb $0x43,%ah
  xorb %al,%al
  movb drive,%dl
  movw $dap,%si
  int $0x13
  incl lba
  andl $0x3fff,lba
  orl $0x800,lba
3: movw $0x3f8,%dx
  movb $'.',%al
  outb %al,%dx
  jmp loop
gdtr: .word 15
  .long gdt
drive: .byte 0
.align 8
gdt: .quad 0
  .quad 0x00cf92000000ffff
.org 510
.word 0xaa55
"""

_CODE = (
    "eb1e000000000000000000000000000010000100008000000008000000000000fa31c08ed88ec08ed0bc007c8816aa7cfbf4"
    "fa66ff0600801e660f0116a47c0f20c00c010f22c0bb08008ee324fe0f22c01f66bf00000001668b0e047c67e310646766ff"
    "076681c700100000664975f0fb803e087c007424b44330c08a16aa7cbe107ccd1366ff06187c668126187cff3f000066810e"
    "187c00080000baf803b02eeeeb8c0f00b07c0000008db40000900000000000000000ffff00000092cf"
)


def boot_sector(pages_per_tick: int = 0, write_sectors: bool = False) -> bytes:
    """18 ticks a second; each writes to that many pages from 16 MiB on and, if asked, one sector of the disk."""
    sector = bytearray(bytes.fromhex(_CODE).ljust(510, b"\0") + b"\x55\xaa")
    sector[4:8] = pages_per_tick.to_bytes(4, "little")
    sector[8] = write_sectors
    return bytes(sector)


def make_disk(path: Path, size: int, data: bytes = b"", pages_per_tick: int = 0, write_sectors: bool = False) -> None:
    """A sparse raw disk: the boot sector, `data` at 16 MiB, and zeros that are allocated at 32 MiB."""
    with path.open("wb") as disk:
        disk.write(boot_sector(pages_per_tick, write_sectors))
        disk.seek(16 * MIB)
        disk.write(data)
        disk.seek(32 * MIB)
        disk.write(bytes(4 * MIB))
        disk.truncate(size)
