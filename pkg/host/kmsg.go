package host

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// ParseKernelRecord parses one record of /dev/kmsg,
// "prio,seq,usec,flags[,..];text\n KEY=value..." (Documentation/ABI/testing/dev-kmsg).
// Unprintable bytes of the text are escaped as \xNN by the kernel and left so.
func ParseKernelRecord(data []byte) (KernelRecord, error) {
	head, text, ok := bytes.Cut(data, []byte(";"))
	if !ok {
		return KernelRecord{}, errors.New("kmsg: no ';'")
	}
	text, _, _ = bytes.Cut(text, []byte("\n"))
	fields := bytes.SplitN(head, []byte(","), 5)
	if len(fields) < 4 {
		return KernelRecord{}, fmt.Errorf("kmsg: %d header fields, want 4", len(fields))
	}
	prio, err := strconv.ParseUint(string(fields[0]), 10, 16)
	if err != nil {
		return KernelRecord{}, fmt.Errorf("kmsg: priority: %w", err)
	}
	seq, err := strconv.ParseUint(string(fields[1]), 10, 64)
	if err != nil {
		return KernelRecord{}, fmt.Errorf("kmsg: sequence: %w", err)
	}
	usec, err := strconv.ParseInt(string(fields[2]), 10, 64)
	if err != nil || usec < 0 || usec > int64(1<<63-1)/1000 {
		return KernelRecord{}, fmt.Errorf("kmsg: timestamp %q", fields[2])
	}
	return KernelRecord{
		Priority: int(prio & 7),
		Facility: int(prio >> 3),
		Sequence: seq,
		Time:     time.Duration(usec) * time.Microsecond,
		Text:     string(text),
	}, nil
}
