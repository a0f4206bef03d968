/* Attacks on the parent, made by native code inside a compartment. Nothing in here knows
 * Rust; each returns only if the attack was not noticed. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <sys/syscall.h>

uint64_t attack_read(uint64_t address)
{
    return *(volatile uint64_t *)address;
}

void attack_write(uint64_t address)
{
    *(volatile uint64_t *)address = 0x6a7e5;
}

/* With the arguments of a function that takes any. */
uint64_t attack_jump(uint64_t address)
{
    return ((uint64_t (*)(uint64_t, uint64_t))address)(1, 2);
}

/* Returns into an address as a smashed stack would. */
void attack_return_to(uint64_t address)
{
    __asm__ volatile("push %0\n\tret" : : "r"(address) : "memory");
}

static long call(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e)
{
    long result;
    register uint64_t r10 __asm__("r10") = d;
    register uint64_t r8 __asm__("r8") = e;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

long attack_call(const uint64_t *all)
{
    return call((long)all[0], all[1], all[2], all[3], all[4], all[5]);
}

/* Runs past the end of a buffer on the heap until somebody stops it. */
uint64_t attack_overread(void)
{
    volatile uint8_t *buffer = calloc(1, 16);
    uint64_t sum = 0;
    for (uint64_t n = 0;; n++)
        sum += buffer[n];
    return sum;
}

/* Every system call there is, with arguments that would do harm; how many were not refused. */
uint64_t attack_every_call(uint64_t secret)
{
    uint64_t done = 0;
    for (long number = 0; number < 470; number++) {
        /* What says and does nothing, or ends the compartment. */
        if (number == SYS_exit || number == SYS_exit_group || number == SYS_getpid ||
            number == SYS_gettid || number == SYS_sched_yield || number == SYS_munmap ||
            number == SYS_sigaltstack || number == SYS_rt_sigprocmask)
            continue;
        if (call(number, secret, 4096, 7, 0x22, (uint64_t)-1) != -1 /* EPERM */)
            done++;
    }
    return done;
}

/* The frame of a caller, overwritten. */
uint64_t attack_smash(uint64_t address)
{
    volatile uint64_t *frame = __builtin_frame_address(0);
    frame[0] = address;
    frame[1] = address;
    return 0;
}
