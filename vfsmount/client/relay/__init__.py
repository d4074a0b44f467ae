"""The relay engine: the kernel's own FUSE messages, put on the virtqueue as they stand.

The way of a request, and back:

    loop                what the thread does: requests down, replies up. Begin here
    kernel, device      the two ends
    slots, rooms        where messages lie, and how much room they get
    routes, route       the table: what is done with which opcode, and by which function in
    known, walkers,     ... requests that are answered, changed, held or noted on the way
    handles, writes,
    set_id, writeback,
    locks
    answers             replies
    rewrite, listings   what is changed in them

What some requests wait for, and what is left of them:

    opens, questions    what goes with an OPEN: the check in mode ``auto``,
    reuse               ... an open that gets a handle which was closed a moment ago, and
    passthrough         which files the kernel reads and writes by itself: the decision,
    passed_nodes        ... who does so,
    set_ups, backing    ... and what the daemon and the kernel are asked for that
    late, undo          requests answered before their time
    interrupts          callers that got a signal
    memory, unwritten   what is remembered of files

The thread:

    init                INIT, before there is a loop
    thread              its life, as others see it
    parts               who works with whom
    sleeper, orders     what it sleeps on; what other threads say
    caretaker           what has to be done now and then
    ending              the end
    time_slice          who runs next on one CPU
"""
