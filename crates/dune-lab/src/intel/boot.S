# The boot sector of the lab's disk: loads the pieces listed behind it into
# memory and enters the kernel by its PVH entry.
#
# The BIOS puts it at 0x7c00 and enters it in real mode. It goes to 32-bit
# protected mode at once and reads the disk itself, by programmed I/O with the
# 48-bit commands: pieces lie above 1 MiB, where the BIOS cannot read to, and
# one command carries up to 65,535 sectors.
#
#   table: { address, first sector, number of sectors } of 32 bits each ...
#          { 0, 0, 0 }
#          entry point, what the kernel gets in ebx
#
# Registers: esi the table, edi where to, ebx the next sector, ebp sectors
# left of this piece, ecx sectors left of this command.

.set BASE, 0x7c00
.set ATA_DATA, 0x1f0
.set ATA_COUNT, 0x1f2
.set ATA_DRIVE, 0x1f6
.set ATA_COMMAND, 0x1f7
.set READ_SECTORS_EXT, 0x24

.pushsection .rodata.dune_lab_boot, "a"
.global dune_lab_boot_start
.global dune_lab_boot_end
.balign 16
dune_lab_boot_start:
.code16
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl (.Lgdt_pointer - dune_lab_boot_start + BASE)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x08, $(.Lprotected - dune_lab_boot_start + BASE)

.code32
.Lprotected:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %eax, %fs
    movl %eax, %gs
    movl $BASE, %esp
    cld
    movl $(.Ltable - dune_lab_boot_start + BASE), %esi

.Lpiece:
    movl 0(%esi), %edi
    movl 4(%esi), %ebx
    movl 8(%esi), %ebp
    addl $12, %esi
    testl %ebp, %ebp
    jz .Lenter

.Lcommand:
    movl %ebp, %ecx
    cmpl $0xffff, %ecx
    jbe 1f
    movl $0xffff, %ecx
1:  subl %ecx, %ebp
    movl $ATA_DRIVE, %edx
    movb $0x40, %al             # first drive, addressed by sector
    outb %al, %dx
    call .Lnot_busy
    # Each register takes the high byte first, then the low byte.
    movl $ATA_COUNT, %edx
    movb %ch, %al
    outb %al, %dx
    incl %edx
    movl %ebx, %eax
    shrl $24, %eax
    outb %al, %dx
    incl %edx
    xorl %eax, %eax             # no sector number here exceeds 32 bits
    outb %al, %dx
    incl %edx
    outb %al, %dx
    movl $ATA_COUNT, %edx
    movb %cl, %al
    outb %al, %dx
    incl %edx
    movl %ebx, %eax
    outb %al, %dx
    incl %edx
    shrl $8, %eax
    outb %al, %dx
    incl %edx
    shrl $8, %eax
    outb %al, %dx
    movl $ATA_COMMAND, %edx
    movb $READ_SECTORS_EXT, %al
    outb %al, %dx
    addl %ecx, %ebx

.Lsector:
    pushl %ecx
    call .Lnot_busy
2:  inb %dx, %al
    testb $0x21, %al            # error or device fault
    jnz .Lstop
    testb $0x08, %al            # data request
    jz 2b
    movl $ATA_DATA, %edx
    movl $128, %ecx
    rep insl
    popl %ecx
    decl %ecx
    jnz .Lsector
    testl %ebp, %ebp
    jnz .Lcommand
    jmp .Lpiece

.Lnot_busy:
    movl $ATA_COMMAND, %edx
1:  inb %dx, %al
    testb %al, %al
    js 1b
    ret

.Lstop:
    hlt
    jmp .Lstop

.Lenter:
    movl 4(%esi), %ebx
    movl 0(%esi), %eax
    jmp *%eax

.balign 8
.Lgdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # 0x08: code, flat, 32 bits
    .quad 0x00cf93000000ffff    # 0x10: data, flat
.Lgdt_pointer:
    .word 23
    .long .Lgdt - dune_lab_boot_start + BASE
.balign 4
.Ltable:
dune_lab_boot_end:
.code64
.popsection
