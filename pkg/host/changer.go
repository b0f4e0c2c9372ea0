package host

import (
	"context"
	"fmt"
	"net"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Changer is what changes the host: files, units, modules, kernel settings. It
// is a type apart from the [View], so that code that was handed a View can not
// write, and it is made in one place only: where a person or the config asked
// for repairs. Its methods may be called from many goroutines.
type Changer struct{ h *Host }

// OpenForChange reaches for the machine this process runs on, as [Open] does.
func OpenForChange(o Options) (*Changer, error) {
	if o.Observe {
		return nil, errObserves
	}
	h, err := Open(o)
	if err != nil {
		return nil, err
	}
	return &Changer{h}, nil
}

// Close gives up the connections to the host.
func (c *Changer) Close() error { return c.h.Close() }

// change makes one call that writes, given up with its context like any other.
// What was given up may still happen: the caller reads the host before it says
// what came of it.
func (c *Changer) change(ctx context.Context, what string, f func() error) error {
	_, err := bound(ctx, &c.h.calls, what, nil, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

const journalSocket = "/run/systemd/journal/socket"

// Record writes an entry to the host's journal (systemd's native protocol,
// https://systemd.io/JOURNAL_NATIVE_PROTOCOL), so that whoever looks there after
// an incident finds what the agent did. Field names are upper case letters,
// digits and underscores.
func (c *Changer) Record(ctx context.Context, message string, fields map[string]string) error {
	return c.change(ctx, journalSocket, func() error {
		fd, err := c.h.openSocket(journalSocket)
		if err != nil {
			return fmt.Errorf("%s: %w", journalSocket, err)
		}
		defer unix.Close(fd)
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unixgram", fdName(fd))
		if err != nil {
			return fmt.Errorf("%s: %w", journalSocket, err)
		}
		defer conn.Close()
		_, err = conn.Write(journalEntry(message, fields))
		return err
	})
}

func journalEntry(message string, fields map[string]string) []byte {
	var b strings.Builder
	add := func(name, value string) {
		// A newline in a value would begin the next field.
		value = strings.ReplaceAll(value, "\n", " | ")
		b.WriteString(name + "=" + value + "\n")
	}
	add("MESSAGE", message)
	add("PRIORITY", "5") // notice
	add("SYSLOG_IDENTIFIER", "host-hygiene")
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		add("HYGIENE_"+name, fields[name])
	}
	return []byte(b.String())
}
