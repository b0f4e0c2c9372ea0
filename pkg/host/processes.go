package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"syscall"
)

// pfKthread is PF_KTHREAD of include/linux/sched.h.
const pfKthread = 0x00200000

// readProcesses lists /proc. A process that ends meanwhile is left out.
func readProcesses(ctx context.Context, files Files) ([]Process, error) {
	names, err := files.ReadDir(ctx, "/proc")
	if err != nil {
		return nil, err
	}
	procs := make([]Process, 0, len(names))
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		data, err := files.ReadFile(ctx, "/proc/"+name+"/stat")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			return nil, err
		}
		p, err := parseProcStat(data)
		if err != nil {
			return nil, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		procs = append(procs, p)
	}
	return procs, nil
}

// parseProcStat parses proc_pid_stat(5). The comm in field 2 is the process's
// own choice and may contain spaces, parentheses and newlines, so the fields
// behind it count from the last ')'.
func parseProcStat(data []byte) (Process, error) {
	open, shut := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if open < 1 || shut < open {
		return Process{}, errors.New("no (comm) field")
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(data[:open])))
	if err != nil {
		return Process{}, fmt.Errorf("pid: %w", err)
	}
	rest := bytes.Fields(data[shut+1:])
	const state, ppid, flags, threads, starttime = 0, 1, 6, 17, 19 // field 3 is rest[0]
	if len(rest) <= starttime || len(rest[state]) != 1 {
		return Process{}, fmt.Errorf("%d fields behind comm, want at least %d", len(rest), starttime+1)
	}
	p := Process{PID: pid, Comm: string(data[open+1 : shut]), State: rest[state][0]}
	if p.PPID, err = strconv.Atoi(string(rest[ppid])); err != nil {
		return Process{}, fmt.Errorf("ppid: %w", err)
	}
	fl, err := strconv.ParseUint(string(rest[flags]), 10, 32)
	if err != nil {
		return Process{}, fmt.Errorf("flags: %w", err)
	}
	p.Kernel = fl&pfKthread != 0
	if p.Threads, err = strconv.Atoi(string(rest[threads])); err != nil {
		return Process{}, fmt.Errorf("num_threads: %w", err)
	}
	if p.StartTicks, err = strconv.ParseUint(string(rest[starttime]), 10, 64); err != nil {
		return Process{}, fmt.Errorf("starttime: %w", err)
	}
	return p, nil
}
