/* The memory workload: pages are rewritten in a circle at a set rate, and checked in a circle as well.
 *
 * Page i's generation follows from the number of pages written so far, so a page that is stale (a lost write) is found
 * as surely as one that is torn or changed. */
#define _GNU_SOURCE
#include "shared.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

static const uint64_t MAGIC = 0x5646504147453031ULL; /* "VFPAGE01" */
static const uint64_t KEEP_FREE = 20 << 20;

static uint64_t *area, pages, written;

static uint64_t generation_of(uint64_t index)
{
    return written / pages + (index < written % pages);
}

static int check_page(uint64_t index)
{
    const uint64_t *page = area + index * WORDS;
    int sound = page_sound(page, MAGIC, index, generation_of(index));
    shared->memory_pages_checked++;
    if (sound)
        return 1;
    if (!shared->memory_errors++) {
        snprintf(shared->memory_first_error, TEXT, "page %llu: expected generation %llu, holds page %llu generation %llu",
                 (unsigned long long)index, (unsigned long long)generation_of(index), (unsigned long long)page[1],
                 (unsigned long long)page[2]);
        say("vf: memory error: %s", shared->memory_first_error);
    }
    return 0;
}

static void write_next(void)
{
    uint64_t index = written % pages;
    page_write(area + index * WORDS, MAGIC, index, written / pages + 1);
    written++;
    shared->memory_pages_written = written;
}

static void check_all(struct job *job)
{
    uint32_t asked = job->asked;
    job->checked = job->errors = 0;
    job->first_error[0] = 0;
    for (uint64_t i = 0; i < pages; i++) {
        job->checked++;
        if (check_page(i))
            continue;
        if (!job->errors++)
            memcpy(job->first_error, shared->memory_first_error, TEXT);
    }
    job->finished = asked;
}

void run_memory(void)
{
    uint64_t size = options.wss_mib << 20;
    struct sysinfo info;
    sysinfo(&info);
    uint64_t free = (uint64_t)info.freeram * info.mem_unit, most = free > KEEP_FREE + PAGE ? free - KEEP_FREE : PAGE;
    if (size > most) {
        size = most & ~(uint64_t)(PAGE - 1);
        say("vf: the working set is cut to %llu MiB: the guest has no more memory", (unsigned long long)(size >> 20));
    }
    area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (area == MAP_FAILED) {
        say("vf: no room for a working set of %llu MiB", (unsigned long long)options.wss_mib);
        return;
    }
    pages = size / PAGE;
    for (uint64_t i = 0; i < pages; i++)
        write_next();
    shared->memory_wss_bytes = size;
    say("vf: memory ready");

    const uint64_t slice_us = 10000;
    uint64_t next = now_us(), owed_write = 0, owed_check = 0, cursor = 0;
    for (;;) {
        owed_write += shared->memory_rate_bytes * slice_us / 1000000;
        owed_check += shared->memory_check_bytes * slice_us / 1000000;
        for (; owed_write >= PAGE; owed_write -= PAGE)
            write_next();
        for (; owed_check >= PAGE; owed_check -= PAGE)
            check_page(cursor++ % pages);
        if (shared->memory_job.asked != shared->memory_job.finished)
            check_all(&shared->memory_job);
        next += slice_us;
        uint64_t now = now_us();
        if (now > next + 10 * slice_us) /* starved: do not pay back in one burst */
            next = now;
        sleep_until_us(next);
    }
}
