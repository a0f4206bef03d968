// Every way into and out of ring 0. AT&T syntax; operands in braces are constants computed
// in Rust (arch/mod.rs): A_* are offsets into ThreadArea (thread.rs), F_* into TrapFrame
// (dune-x86, trap.rs).
//
// Invariants, which hold wherever no comment says otherwise:
//   ring 0 runs with GS base = its ThreadArea (by its high alias), IOPL = 3, DF = 0;
//   ring 3 runs with IOPL = 0, and KERNEL_GS_BASE = the ThreadArea;
//   IF = 0 from every entry until the thread is off the interrupt stack.
//
// "High" labels are reached by their alias in the upper half of the address space (see
// memory/identity.rs), which every address space shares; they may touch memory only through
// %gs: and through high pointers until CR3 is the process's own again.

    .text

// ---------------------------------------------------------------------------------------
// SYSCALL. rax = number, rdi rsi rdx r10 r8 r9 = arguments, rcx = return address,
// r11 = flags of the caller. IOPL in r11 tells the caller's ring: ring 3 cannot change it.
// High.
    .globl  dune_syscall_entry
    .p2align 6
dune_syscall_entry:
    bt      $12, %r11
    jnc     .Lsyscall_from_ring3
    cmp     ${NR_GETPID}, %eax
    je      .Lgetpid
    cmp     ${NR_GETTID}, %eax
    je      .Lgettid
    cmp     ${NR_SIGRETURN}, %eax
    je      .Lsigreturn
    mov     %rax, %gs:{A_NUMBER}
    mov     %rdi, %gs:{A_ARG0}
    mov     %rsi, %gs:{A_ARG1}
    mov     %rdx, %gs:{A_ARG2}
    mov     %r10, %gs:{A_ARG3}
    mov     %r8, %gs:{A_ARG4}
    mov     %r9, %gs:{A_ARG5}
    mov     %rsp, %gs:{A_CALL_RSP}
    out     %al, ${PORT_SYSCALL}
    // A thread or process that was just made starts here too, with its own GS.
    .globl  dune_after_syscall
dune_after_syscall:
    mov     %gs:{A_RESULT}, %rax
    cmpl    $0, %gs:{A_PENDING}
    jne     .Lsyscall_pending
.Lsyscall_return:
    // SYSRET cannot return to ring 0. The red zone below rsp belongs to the caller.
    lea     -128(%rsp), %rsp
    push    %r11
    popfq
    lea     128(%rsp), %rsp
    jmp     *%rcx

.Lgetpid:
    mov     %gs:{A_PID}, %eax
    jmp     .Lsyscall_return
.Lgettid:
    mov     %gs:{A_TID}, %eax
    jmp     .Lsyscall_return

// The slow ways build the frame that an exception would have built, on the interrupt stack,
// which is free: nothing stays on it while interrupts are on.
.Lsyscall_pending:
    // With interrupts off it is a call of the runtime itself, which no signal interrupts: if
    // it was not made, it is made now, and the signal waits until interrupts are on again.
    bt      $9, %r11
    jc      1f
    cmp     ${RESTART}, %rax
    jne     .Lsyscall_return
    out     %al, ${PORT_RUNTIME}
    mov     %gs:{A_RESULT}, %rax
    jmp     .Lsyscall_return
1:
    mov     %rsp, %gs:{A_SCRATCH}
    mov     %gs:{A_IST}, %rsp
    pushq   ${KERNEL_SS}
    pushq   %gs:{A_SCRATCH}
    push    %r11
    pushq   ${KERNEL_CS}
    push    %rcx
    pushq   %gs:{A_NUMBER}
    pushq   ${VECTOR_SYSCALL}
    jmp     .Ltrap_from_ring0
.Lsigreturn:
    mov     %rsp, %gs:{A_SCRATCH}
    mov     %gs:{A_IST}, %rsp
    pushq   ${KERNEL_SS}
    pushq   %gs:{A_SCRATCH}
    push    %r11
    pushq   ${KERNEL_CS}
    push    %rcx
    pushq   ${NR_SIGRETURN}
    pushq   ${VECTOR_SIGRETURN}
    jmp     .Ltrap_from_ring0

// ---------------------------------------------------------------------------------------
// Exceptions and interrupts: 256 stubs of 16 bytes. The CPU has switched to the interrupt
// stack and pushed ss rsp rflags cs rip [error]. High.
    .globl  dune_vectors
    .p2align 6
dune_vectors:
    .set    vector, 0
    .rept   256
    .p2align 4
    .if     vector < 32 && (({ERROR_CODE_VECTORS} >> vector) & 1)
    .else
    pushq   $0
    .endif
    pushq   $vector
    jmp     .Ltrap
    .set    vector, vector + 1
    .endr

    .p2align 4
.Ltrap:
    // 0 vector, 8 error, 16 rip, 24 cs, 32 rflags, 40 rsp, 48 ss
    cld
    testb   $3, 24(%rsp)
    jnz     .Ltrap_from_ring3

.Ltrap_from_ring0:
    push    %rax
    push    %rbx
    push    %rcx
    // Handlers run on the trap stack; a trap on the trap stack continues below.
    mov     64(%rsp), %rax
    mov     $1, %ebx
    mov     %ebx, %gs:{A_SCRATCH}
    mov     %gs:{A_TRAP_HIGH}, %rbx
    mov     %rax, %rcx
    // The guard page below counts too: a handler that has used up the stack faults there.
    sub     %gs:{A_TRAP_LOW}, %rcx
    add     $4096, %rcx
    cmp     ${TRAP_STACK_SIZE} + 4096, %rcx
    jae     1f
    lea     -128(%rax), %rbx
    mov     %gs:{A_DEPTH}, %ecx
    inc     %ecx
    mov     %ecx, %gs:{A_SCRATCH}
1:
    sub     %gs:{A_XSAVE_SIZE}, %rbx
    and     $-64, %rbx
    lea     -{F_SIZE}(%rbx), %rax
    cmp     %gs:{A_TRAP_LIMIT}, %rax
    jb      .Ltoo_deep
.Lframe_placed:
    // The header of an XSAVE area must be zero before its first use.
    xor     %ecx, %ecx
    mov     %rcx, 512(%rbx)
    mov     %rcx, 520(%rbx)
    mov     %rcx, 528(%rbx)
    mov     %rcx, 536(%rbx)
    mov     %rcx, 544(%rbx)
    mov     %rcx, 552(%rbx)
    mov     %rcx, 560(%rbx)
    mov     %rcx, 568(%rbx)
    mov     %rbx, {F_XSAVE}(%rax)
    mov     %gs:{A_SCRATCH}, %ecx
    mov     %rcx, {F_DEPTH}(%rax)
    mov     %ecx, %gs:{A_DEPTH}
    popq    {F_RCX}(%rax)
    popq    {F_RBX}(%rax)
    popq    {F_RAX}(%rax)
    popq    {F_VECTOR}(%rax)
    popq    {F_ERROR}(%rax)
    popq    {F_RIP}(%rax)
    popq    {F_CS}(%rax)
    popq    {F_RFLAGS}(%rax)
    popq    {F_RSP}(%rax)
    popq    {F_SS}(%rax)
    mov     %rax, %rsp
    // Off the interrupt stack.
    mov     %rdx, {F_RDX}(%rsp)
    mov     %rsi, {F_RSI}(%rsp)
    mov     %rdi, {F_RDI}(%rsp)
    mov     %rbp, {F_RBP}(%rsp)
    mov     %r8, {F_R8}(%rsp)
    mov     %r9, {F_R9}(%rsp)
    mov     %r10, {F_R10}(%rsp)
    mov     %r11, {F_R11}(%rsp)
    mov     %r12, {F_R12}(%rsp)
    mov     %r13, {F_R13}(%rsp)
    mov     %r14, {F_R14}(%rsp)
    mov     %r15, {F_R15}(%rsp)
    mov     %cr2, %rcx
    mov     %rcx, {F_CR2}(%rsp)
    mov     $-1, %eax
    mov     $-1, %edx
    xsave64 (%rbx)
    jmp     *%gs:{A_LOW_TRAP}

.Ltoo_deep:
    // No room for one more handler: the lower end of the trap stack is kept for the report.
    // A trap in the report, such as a first touch of memory, goes on below.
    mov     64(%rsp), %rcx
    cmp     %gs:{A_TRAP_LIMIT}, %rcx
    jae     2f
    cmp     %gs:{A_TRAP_LOW}, %rcx
    jb      2f
    cmp     %gs:{A_TRAP_LOW}, %rax
    jb      3f
    cmpl    ${STACK_USED_UP}, %gs:{A_DEPTH}
    jae     .Lframe_placed
    // Not the report yet: a handler whose locals reach down to here.
    movl    ${STACK_USED_UP}, %gs:{A_SCRATCH}
    jmp     .Lframe_placed
3:
    // The report has no room either.
    movq    ${SIGSEGV}, %gs:{A_RESULT}
    out     %al, ${PORT_DIE}
2:
    movl    ${STACK_USED_UP}, %gs:{A_SCRATCH}
    mov     %gs:{A_TRAP_LIMIT}, %rbx
    sub     %gs:{A_XSAVE_SIZE}, %rbx
    and     $-64, %rbx
    lea     -{F_SIZE}(%rbx), %rax
    jmp     .Lframe_placed

// ---------------------------------------------------------------------------------------
// The lower half's continuation of a trap: the same code by its ordinary address, so that
// unwinders find it. The CFI describes the frame as a signal frame: a backtrace taken in a
// handler goes on in the code that trapped.
    .globl  dune_low_trap
    .p2align 4
    .type   dune_low_trap, @function
    .cfi_startproc simple
    .cfi_signal_frame
    .cfi_def_cfa %rsp, {F_SIZE}
    .cfi_offset %r15, {F_R15}-{F_SIZE}
    .cfi_offset %r14, {F_R14}-{F_SIZE}
    .cfi_offset %r13, {F_R13}-{F_SIZE}
    .cfi_offset %r12, {F_R12}-{F_SIZE}
    .cfi_offset %rbp, {F_RBP}-{F_SIZE}
    .cfi_offset %rbx, {F_RBX}-{F_SIZE}
    .cfi_offset %rsp, {F_RSP}-{F_SIZE}
    .cfi_offset %rip, {F_RIP}-{F_SIZE}
    nop
dune_low_trap:
    mov     %rsp, %rdi
    call    {trap}
.Llow_return:
    cli
    cmpl    $0, %gs:{A_PENDING}
    jne     .Lreturn_pending
.Lreturn:
    mov     {F_DEPTH}(%rsp), %ecx
    dec     %ecx
    mov     %ecx, %gs:{A_DEPTH}
    mov     {F_XSAVE}(%rsp), %rbx
    mov     $-1, %eax
    mov     $-1, %edx
    xrstor64 (%rbx)
    mov     {F_RCX}(%rsp), %rcx
    mov     {F_RBX}(%rsp), %rbx
    mov     {F_RAX}(%rsp), %rax
    mov     {F_RDX}(%rsp), %rdx
    mov     {F_RSI}(%rsp), %rsi
    mov     {F_RDI}(%rsp), %rdi
    mov     {F_RBP}(%rsp), %rbp
    mov     {F_R8}(%rsp), %r8
    mov     {F_R9}(%rsp), %r9
    mov     {F_R10}(%rsp), %r10
    mov     {F_R11}(%rsp), %r11
    mov     {F_R12}(%rsp), %r12
    mov     {F_R13}(%rsp), %r13
    mov     {F_R14}(%rsp), %r14
    mov     {F_R15}(%rsp), %r15
    lea     {F_RIP}(%rsp), %rsp
    iretq
.Lreturn_pending:
    testl   $0x200, {F_RFLAGS}(%rsp)
    jz      .Lreturn
    mov     %rsp, %rdi
    call    {deliver}
    jmp     .Llow_return
    .cfi_endproc
    .size   dune_low_trap, . - dune_low_trap

// ---------------------------------------------------------------------------------------
// Ring 3. dune_run_user() runs the context at %gs:A_USER until it traps, and returns.
    .globl  dune_run_user
    .p2align 4
    .type   dune_run_user, @function
dune_run_user:
    .cfi_startproc
    push    %rbp
    push    %rbx
    push    %r12
    push    %r13
    push    %r14
    push    %r15
    pushfq
    cli
    stmxcsr %gs:{A_MXCSR}
    fnstcw  %gs:{A_X87_CONTROL}
    mov     %rsp, %gs:{A_RUN_RSP}
    rdfsbase %rax
    mov     %rax, %gs:{A_FS_BASE}
    jmp     *%gs:{A_HIGH_RUN}
    .cfi_endproc
    .size   dune_run_user, . - dune_run_user

// High.
    .globl  dune_high_run
dune_high_run:
    mov     %gs:{A_USER}, %rsp
    cmpl    $0, %gs:{A_PENDING}
    jne     .Linterrupted_before
    mov     {U_FS_BASE}(%rsp), %rax
    wrfsbase %rax
    mov     {U_GS_BASE}(%rsp), %rcx
    mov     {U_CR3}(%rsp), %rdx
    mov     %gs:{A_USER_XSAVE}, %rbx
    cmp     %gs:{A_CR3}, %rdx
    je      1f
    mov     %rdx, %cr3
1:
    mov     $-1, %eax
    mov     $-1, %edx
    xrstor64 (%rbx)
    swapgs
    wrgsbase %rcx
    mov     {F_RCX}(%rsp), %rcx
    mov     {F_RBX}(%rsp), %rbx
    mov     {F_RAX}(%rsp), %rax
    mov     {F_RDX}(%rsp), %rdx
    mov     {F_RSI}(%rsp), %rsi
    mov     {F_RDI}(%rsp), %rdi
    mov     {F_RBP}(%rsp), %rbp
    mov     {F_R8}(%rsp), %r8
    mov     {F_R9}(%rsp), %r9
    mov     {F_R10}(%rsp), %r10
    mov     {F_R11}(%rsp), %r11
    mov     {F_R12}(%rsp), %r12
    mov     {F_R13}(%rsp), %r13
    mov     {F_R14}(%rsp), %r14
    mov     {F_R15}(%rsp), %r15
    lea     {F_RIP}(%rsp), %rsp
    iretq

.Linterrupted_before:
    movq    ${VECTOR_NOTIFY}, {F_VECTOR}(%rsp)
    jmp     .Lback_in_ring0

// A trap in ring 3: everything goes into the context. High, on the interrupt stack.
.Ltrap_from_ring3:
    push    %rax
    push    %rbx
    rdgsbase %rbx
    swapgs
    mov     %gs:{A_USER}, %rax
    mov     %rbx, {U_GS_BASE}(%rax)
    popq    {F_RBX}(%rax)
    popq    {F_RAX}(%rax)
    popq    {F_VECTOR}(%rax)
    popq    {F_ERROR}(%rax)
    popq    {F_RIP}(%rax)
    popq    {F_CS}(%rax)
    popq    {F_RFLAGS}(%rax)
    popq    {F_RSP}(%rax)
    popq    {F_SS}(%rax)
    mov     %rcx, {F_RCX}(%rax)
    mov     %r11, {F_R11}(%rax)
    mov     %cr2, %rcx
    mov     %rcx, {F_CR2}(%rax)
    jmp     .Lsave_ring3

// A system call from ring 3. High, still on the stack of ring 3.
.Lsyscall_from_ring3:
    swapgs
    mov     %rsp, %gs:{A_SCRATCH}
    mov     %gs:{A_USER}, %rsp
    mov     %rbx, {F_RBX}(%rsp)
    // Has it an answer that never changes (answers.rs)?
    mov     {U_ANSWERS}(%rsp), %rbx
    test    %rbx, %rbx
    jz      .Lask_the_guard
    cmp     ${ANSWERED_CALLS}, %rax
    jae     .Lask_the_guard
    // Behind a SYSCALL in the last bytes of the lower half; SYSRET would fault in ring 0
    // (SDM vol. 2, SYSRET).
    bt      $47, %rcx
    jc      .Lask_the_guard
    movswq  (%rbx, %rax, 2), %rbx
    test    %rbx, %rbx
    jz      .Lask_the_guard
    js      1f
    cmp     ${THREAD_ID}, %ebx
    mov     %gs:{A_PID}, %ebx
    jne     1f
    mov     %gs:{A_TID}, %ebx
1:
    mov     %rbx, %rax
    mov     {F_RBX}(%rsp), %rbx
    mov     %gs:{A_SCRATCH}, %rsp
    swapgs
    sysretq

.Lask_the_guard:
    mov     %rax, {F_RAX}(%rsp)
    mov     %rsp, %rax
    mov     %gs:{A_SCRATCH}, %rbx
    mov     %rbx, {F_RSP}(%rax)
    mov     %rcx, {F_RIP}(%rax)
    mov     %rcx, {F_RCX}(%rax)
    mov     %r11, {F_RFLAGS}(%rax)
    mov     %r11, {F_R11}(%rax)
    movq    ${VECTOR_SYSCALL}, {F_VECTOR}(%rax)
    swapgs
    rdgsbase %rbx
    swapgs
    mov     %rbx, {U_GS_BASE}(%rax)

.Lsave_ring3:
    // rax = context
    mov     %rdx, {F_RDX}(%rax)
    mov     %rsi, {F_RSI}(%rax)
    mov     %rdi, {F_RDI}(%rax)
    mov     %rbp, {F_RBP}(%rax)
    mov     %r8, {F_R8}(%rax)
    mov     %r9, {F_R9}(%rax)
    mov     %r10, {F_R10}(%rax)
    mov     %r12, {F_R12}(%rax)
    mov     %r13, {F_R13}(%rax)
    mov     %r14, {F_R14}(%rax)
    mov     %r15, {F_R15}(%rax)
    rdfsbase %rcx
    mov     %rcx, {U_FS_BASE}(%rax)
    mov     {U_CR3}(%rax), %rcx
    mov     %gs:{A_USER_XSAVE}, %rbx
    mov     $-1, %eax
    mov     $-1, %edx
    xsave64 (%rbx)
    mov     %gs:{A_CR3}, %rax
    cmp     %rax, %rcx
    je      .Lback_in_ring0
    mov     %rax, %cr3
.Lback_in_ring0:
    // The process's own page tables: low addresses are good again.
    mov     %gs:{A_FS_BASE}, %rax
    wrfsbase %rax
    mov     %gs:{A_RUN_RSP}, %rsp
    // The control words belong to the caller (psABI 3.2.3).
    fninit
    fldcw   %gs:{A_X87_CONTROL}
    ldmxcsr %gs:{A_MXCSR}
    popfq
    pop     %r15
    pop     %r14
    pop     %r13
    pop     %r12
    pop     %rbx
    pop     %rbp
    ret

// ---------------------------------------------------------------------------------------
// Entering and leaving. Both save the callee-saved registers on the thread's own stack and
// its pointer in the area; the other side takes it up from there:
//
//   host:  dune_enter --> host loop --> KVM_RUN ......... dune_host_return --> returns from dune_leave
//   guest:                              dune_guest_resume --> returns from dune_enter
    .globl  dune_enter
    .p2align 4
    .type   dune_enter, @function
dune_enter:                             // rdi = area, on the host
    .cfi_startproc
    push    %rbp
    push    %rbx
    push    %r12
    push    %r13
    push    %r14
    push    %r15
    sub     $8, %rsp
    stmxcsr (%rsp)
    fnstcw  4(%rsp)
    mov     %rsp, {A_PARKED_RSP}(%rdi)
    mov     {A_HOST_RSP}(%rdi), %rsp
    xor     %ebp, %ebp
    call    {host_loop}
    ud2
    .cfi_endproc
    .size   dune_enter, . - dune_enter

    .globl  dune_leave
    .p2align 4
    .type   dune_leave, @function
dune_leave:                             // in the guest
    push    %rbp
    push    %rbx
    push    %r12
    push    %r13
    push    %r14
    push    %r15
    sub     $8, %rsp
    stmxcsr (%rsp)
    fnstcw  4(%rsp)
    cli
    rdfsbase %rax
    mov     %rax, %gs:{A_FS_BASE}
    mov     %rsp, %gs:{A_PARKED_RSP}
    out     %al, ${PORT_LEAVE}
    .globl  dune_guest_resume
dune_guest_resume:                      // in the guest, IF = 0
    mov     %gs:{A_FS_BASE}, %rax
    wrfsbase %rax
    mov     %gs:{A_PARKED_RSP}, %rsp
    pushq   ${RING0_FLAGS}
    popfq
    jmp     1f
    .globl  dune_host_return
dune_host_return:                       // rdi = area, on the host
    mov     {A_PARKED_RSP}(%rdi), %rsp
1:
    ldmxcsr (%rsp)
    fldcw   4(%rsp)
    add     $8, %rsp
    pop     %r15
    pop     %r14
    pop     %r13
    pop     %r12
    pop     %rbx
    pop     %rbp
    ret
    .size   dune_leave, . - dune_leave

// ---------------------------------------------------------------------------------------
// Host side: a forwarded system call that no signal can slip past. rdi = area.
// A signal handler that interrupts between dune_safe_start and dune_safe_end continues at
// dune_safe_abort, and the call is made again after the guest's handler has run. At
// dune_safe_end itself the call is done.
    .globl  dune_safe_syscall
    .p2align 6
dune_safe_syscall:
    push    %r12
    mov     %rdi, %r12
    mov     {A_NUMBER}(%r12), %rax
    mov     {A_ARG0}(%r12), %rdi
    mov     {A_ARG1}(%r12), %rsi
    mov     {A_ARG2}(%r12), %rdx
    mov     {A_ARG3}(%r12), %r10
    mov     {A_ARG4}(%r12), %r8
    mov     {A_ARG5}(%r12), %r9
    .globl  dune_safe_start
dune_safe_start:
    cmpl    $0, {A_PENDING}(%r12)
    jne     dune_safe_abort
    syscall
    .globl  dune_safe_end
dune_safe_end:
    pop     %r12
    ret
    .globl  dune_safe_abort
dune_safe_abort:
    mov     ${RESTART}, %rax
    pop     %r12
    ret

// Host side: clone. rdi = number, rsi = argument array (5), rdx = area of the child, or 0.
// A child with an area starts on its own host stack, which the arguments name, and never
// returns here. One without has a copy of this stack, and returns 0.
    .globl  dune_host_clone
dune_host_clone:
    push    %rbx
    mov     %rdx, %rbx
    mov     %rdi, %rax
    mov     %rsi, %r11
    mov     0(%r11), %rdi
    mov     8(%r11), %rsi
    mov     16(%r11), %rdx
    mov     24(%r11), %r10
    mov     32(%r11), %r8
    syscall
    test    %rax, %rax
    jnz     1f
    test    %rbx, %rbx
    jnz     2f
1:
    pop     %rbx
    ret
2:
    xor     %ebp, %ebp
    mov     %rbx, %rdi
    call    {child_start}
    ud2

// Host side: the end of a thread. rdi = address of the state of its area, esi = the state
// "free", rdx = exit status. After the store the stack may be somebody else's.
    .globl  dune_host_exit
dune_host_exit:
    mov     %esi, (%rdi)
    mov     %rdx, %rdi
    mov     ${NR_EXIT}, %eax
    syscall
    ud2

// Host side: what a signal handler returns to.
    .globl  dune_restorer
dune_restorer:
    mov     ${NR_SIGRETURN}, %eax
    syscall
    ud2

// In the guest: copies rdx bytes from rsi to rdi; 0, or 1 where a byte could not be read or
// written (the trap dispatcher continues at dune_copy_failed).
    .globl  dune_copy
dune_copy:
    mov     %rdx, %rcx
    .globl  dune_copy_start
dune_copy_start:
    rep movsb
    .globl  dune_copy_end
dune_copy_end:
    xor     %eax, %eax
    ret
    .globl  dune_copy_failed
dune_copy_failed:
    mov     $1, %eax
    ret
