/* What the guest's processes share. One anonymous shared mapping, made before any fork.
 *
 * Counters have one writer each and are read by the status service without locks: a reader may be one step behind,
 * never wrong by more. */
#ifndef VF_SHARED_H
#define VF_SHARED_H

#include <stdint.h>

enum { PAGE = 4096, WORDS = PAGE / 8, TOKEN = 40, TEXT = 160 };

/* A job that a client asks for by a token of its own: asking again with the same token never starts it twice. */
struct job {
    volatile uint32_t asked;    /* raised by the status service */
    volatile uint32_t finished; /* set to `asked` by the worker */
    char token[TOKEN];          /* of the job asked for last */
    volatile uint64_t checked, errors;
    char first_error[TEXT];
};

struct shared {
    char boot_id[40];
    uint64_t started_ms;
    volatile uint64_t beats, children_dead;

    volatile uint64_t memory_wss_bytes, memory_rate_bytes, memory_check_bytes;
    volatile uint64_t memory_pages_written, memory_pages_checked, memory_errors;
    char memory_first_error[TEXT];
    struct job memory_job;

    volatile uint64_t disk_rate, disk_written, disk_bytes, disk_io_errors, disk_errors, disk_found;
    volatile uint64_t disk_max_write_us;
    volatile uint64_t fill_bytes, fill_done;
    const char *volatile disk_state;
    char disk_first_error[TEXT];
    struct job disk_job;

    volatile uint64_t udp_received, udp_buffer_drops, tcp_echo_bytes, tcp_connections;
    volatile uint64_t stream_sent_bytes, stream_received_bytes, stream_errors;
};

struct options {
    uint64_t dirty_mb, wss_mib, check_mb;
    uint64_t disk, disk_rate, disk_area_mib, fill_mib, beat_ms;
    uint16_t udp_port, tcp_port, stream_port, status_port;
    int verify_only, shell;
    char disk_device[64];
};

extern struct shared *shared;
extern struct options options;

uint64_t now_us(void);
void sleep_until_us(uint64_t when_us);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One well mixed number of a and b (the finaliser of splitmix64). */
static inline uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t z = a * 0x9e3779b97f4a7c15ULL + b + 0x632be59bd9b4e019ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

/* A page that proves itself: what it is, which generation, content that follows from both, and a checksum. */
void page_write(uint64_t *page, uint64_t magic, uint64_t index, uint64_t generation);
int page_sound(const uint64_t *page, uint64_t magic, uint64_t index, uint64_t generation);

void run_memory(void);
void run_disk(void);
void run_udp_echo(void);
void run_tcp_echo(void);
void run_stream(void);
void run_status(void);
void power_off(void);

#endif
