/* The disk workload: records of one page at a set rate, each followed by fdatasync, past the guest's page cache.
 *
 * Record n has its place in a circle of slots, scattered by an odd multiplier; from the last number written the
 * expected content of every slot follows, so stale, torn and misplaced records are all found. Disk layout:
 *   0        header (area, fill, whether the fill is complete)
 *   1 MiB    the slots
 *   then     `fill` MiB of data that is random but can be computed again */
#define _GNU_SOURCE
#include "shared.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MIB = 1 << 20, STEP_RECORDS = 64 };
static const uint64_t RECORD = 0x5646524543303031ULL; /* "VFREC001" */
static const uint64_t HEADER = 0x5646484541443031ULL; /* "VFHEAD01" */
static const uint64_t SCATTER = 0x9e3779b1, NEVER = 0;

struct header {
    uint64_t magic, slots, fill_mib, fill_done, sum;
};

static int disk;
static uint64_t slots, last; /* `last`: number of the newest record that is on the disk; the first is 1 */
static uint64_t *page, *chunk;
static struct header header;

static uint64_t slot_of(uint64_t number)
{
    return number * SCATTER & (slots - 1);
}

/* The number that the slot holds when `last` was the latest written; NEVER when none reached it yet. */
static uint64_t expected_in(uint64_t slot)
{
    uint64_t inverse = SCATTER; /* Newton: each step doubles the correct low bits */
    for (int i = 0; i < 6; i++)
        inverse *= 2 - SCATTER * inverse;
    uint64_t residue = slot * inverse & (slots - 1);
    uint64_t back = (last - residue) & (slots - 1);
    return last > back ? last - back : NEVER;
}

static int transfer(int writing, void *buffer, size_t size, uint64_t offset)
{
    for (size_t done = 0; done < size;) {
        char *place = (char *)buffer + done;
        ssize_t n = writing ? pwrite(disk, place, size - done, offset + done) : pread(disk, place, size - done, offset + done);
        if (n > 0) {
            done += n;
            continue;
        }
        if (n < 0 && errno == EINTR)
            continue;
        if (!shared->disk_io_errors++)
            say("vf: disk %s failed at %llu: %s", writing ? "write" : "read", (unsigned long long)(offset + done),
                n ? strerror(errno) : "end of disk");
        return 0;
    }
    return 1;
}

static uint64_t header_sum(void)
{
    return mix(mix(header.magic, header.slots), mix(header.fill_mib, header.fill_done));
}

static int store_header(void)
{
    header.sum = header_sum();
    memset(page, 0, PAGE);
    memcpy(page, &header, sizeof header);
    return transfer(1, page, PAGE, 0) && fdatasync(disk) == 0;
}

static int load_header(void)
{
    if (!transfer(0, page, PAGE, 0))
        return 0;
    memcpy(&header, page, sizeof header);
    return header.magic == HEADER && header.sum == header_sum();
}

static uint64_t slot_offset(uint64_t slot)
{
    return MIB + slot * PAGE;
}

static uint64_t fill_offset(uint64_t index)
{
    return slot_offset(slots) + index * MIB;
}

static void make_fill(uint64_t *buffer, uint64_t index)
{
    uint64_t value = mix(index, HEADER);
    for (int i = 0; i < MIB / 8; i++) { /* xorshift64: fast under TCG, and does not compress */
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
        buffer[i] = value;
    }
}

static void note_error(struct job *job, const char *what, uint64_t place, uint64_t expected)
{
    char text[TEXT];
    snprintf(text, TEXT, "%s %llu: expected number %llu", what, (unsigned long long)place, (unsigned long long)expected);
    if (!shared->disk_errors++) {
        memcpy(shared->disk_first_error, text, TEXT);
        say("vf: disk error: %s", text);
    }
    if (!job->errors++)
        memcpy(job->first_error, text, TEXT);
}

/* Checks the next few slots or one MiB of the fill; 0 when there is nothing left. `torn` is a slot whose record may be
 * half written, because the power went away, or slots. */
static int verify_step(struct job *job, uint64_t *cursor, uint64_t torn)
{
    uint64_t at = *cursor;
    if (at < slots) {
        if (!transfer(0, chunk, STEP_RECORDS * PAGE, slot_offset(at)))
            note_error(job, "unreadable slot", at, 0);
        else
            for (uint64_t i = 0; i < STEP_RECORDS; i++) {
                uint64_t expected = expected_in(at + i);
                if (expected == NEVER || at + i == torn)
                    continue;
                job->checked++;
                if (!page_sound(chunk + i * WORDS, RECORD, at + i, expected))
                    note_error(job, "slot", at + i, expected);
            }
        *cursor += STEP_RECORDS;
        return 1;
    }
    uint64_t index = at - slots;
    if (index >= (header.fill_done ? header.fill_mib : 0))
        return 0;
    static uint64_t *wanted;
    if (!wanted && posix_memalign((void **)&wanted, PAGE, MIB))
        return 0;
    make_fill(wanted, index);
    job->checked++;
    if (!transfer(0, chunk, MIB, fill_offset(index)) || memcmp(chunk, wanted, MIB))
        note_error(job, "fill MiB", index, index);
    *cursor += 1;
    return 1;
}

static void verify_at_boot(void)
{
    struct job *job = &shared->disk_job;
    uint64_t cursor = 0;
    while (verify_step(job, &cursor, slot_of(last + 1)))
        ;
    say("vf: disk verified %llu errors %llu", (unsigned long long)job->checked, (unsigned long long)job->errors);
}

static void find_last(void)
{
    for (uint64_t slot = 0; slot < slots; slot += STEP_RECORDS) {
        if (!transfer(0, chunk, STEP_RECORDS * PAGE, slot_offset(slot)))
            continue;
        for (uint64_t i = 0; i < STEP_RECORDS; i++) {
            uint64_t *record = chunk + i * WORDS, number = record[2];
            if (number > last && slot_of(number) == slot + i && page_sound(record, RECORD, slot + i, number))
                last = number;
        }
    }
    shared->disk_found = last;
}

static int fill(void)
{
    shared->disk_state = "filling";
    for (uint64_t i = 0; i < header.fill_mib; i++) {
        make_fill(chunk, i);
        if (!transfer(1, chunk, MIB, fill_offset(i)))
            return 0;
        shared->fill_bytes = (i + 1) * MIB;
    }
    header.fill_done = 1;
    return fdatasync(disk) == 0 && store_header();
}

static int prepare(void)
{
    disk = open(options.disk_device, O_RDWR | O_DIRECT);
    if (disk < 0 || posix_memalign((void **)&page, PAGE, PAGE) || posix_memalign((void **)&chunk, PAGE, MIB)) {
        say("vf: no disk %s", options.disk_device);
        return 0;
    }
    shared->disk_bytes = lseek(disk, 0, SEEK_END);
    if (load_header()) {
        slots = header.slots;
        shared->disk_state = "reading";
        find_last();
        verify_at_boot();
    } else if (!options.verify_only) {
        for (slots = STEP_RECORDS; slots * PAGE * 2 <= options.disk_area_mib * MIB;)
            slots *= 2;
        header = (struct header){.magic = HEADER, .slots = slots, .fill_mib = options.fill_mib};
        if (fill_offset(header.fill_mib) > shared->disk_bytes || !store_header()) {
            say("vf: the disk has no room for the workload");
            return 0;
        }
    }
    if (options.verify_only)
        return 1;
    if (!header.fill_done && header.fill_mib && !fill())
        return 0;
    shared->fill_bytes = header.fill_mib * MIB;
    shared->fill_done = 1;
    if (header.fill_mib)
        say("vf: fill done %llu MiB", (unsigned long long)header.fill_mib);
    return 1;
}

static void write_next(void)
{
    uint64_t number = last + 1, slot = slot_of(number), began = now_us();
    page_write(page, RECORD, slot, number);
    if (!transfer(1, page, PAGE, slot_offset(slot)))
        return;
    if (fdatasync(disk)) {
        shared->disk_io_errors++;
        return;
    }
    last = number;
    shared->disk_written++;
    if (now_us() - began > shared->disk_max_write_us)
        shared->disk_max_write_us = now_us() - began;
}

void run_disk(void)
{
    struct job *job = &shared->disk_job;
    uint64_t next = now_us(), cursor = 0;
    uint32_t running = 0;
    if (!prepare()) {
        shared->disk_state = "failed";
        for (;;)
            pause();
    }
    shared->disk_state = options.verify_only ? "verifying" : "writing";
    for (;;) {
        uint64_t rate = options.verify_only ? 0 : shared->disk_rate, period_us = rate ? 1000000 / rate : 50000;
        if (job->asked != job->finished && running != job->asked) {
            running = job->asked;
            cursor = job->checked = job->errors = 0;
            job->first_error[0] = 0;
        }
        int due = now_us() >= next;
        if (due && rate)
            write_next();
        if (due) {
            next += period_us;
            if (now_us() > next + 500000) /* starved or a slow disk: do not pay back in one burst */
                next = now_us();
        }
        if (job->asked != job->finished && !verify_step(job, &cursor, slots))
            job->finished = running;
        if (job->asked == job->finished)
            sleep_until_us(next);
    }
}
