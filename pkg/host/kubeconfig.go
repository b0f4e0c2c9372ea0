package host

import (
	"bytes"
	"errors"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// KubeconfigServer returns the first `server:` address in a kubeconfig. The file
// may hold keys and tokens, so it is never read whole: one line at a time is
// looked at in a small buffer, which is wiped afterwards. A kubeconfig written
// as JSON or in YAML's flow style has no such line and yields nothing.
func (r *Root) KubeconfigServer(name string) (string, error) {
	fd, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return "", &fs.PathError{Op: "read", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "", &fs.PathError{Op: "read", Path: name, Err: errors.Join(err, ErrNotRegular)}
	}
	return scanServer(func(p []byte) (int, error) { return unix.Read(fd, p) })
}

// scanServer looks for "server: https://..." line by line; a line longer than
// the buffer can not be one.
func scanServer(read func([]byte) (int, error)) (string, error) {
	buf := make([]byte, 512)
	defer clear(buf)
	held, skipping := 0, false
	for {
		n, err := read(buf[held:])
		if err != nil {
			return "", err
		}
		held += n
		data := buf[:held]
		for {
			line, rest, whole := bytes.Cut(data, []byte("\n"))
			if !whole && n != 0 {
				break
			}
			if value, ok := bytes.CutPrefix(bytes.TrimLeft(line, " -\t"), []byte("server:")); ok && !skipping {
				server := strings.Trim(string(bytes.TrimSpace(value)), `"'`)
				if strings.HasPrefix(server, "https://") {
					return server, nil
				}
			}
			skipping = false
			data = rest
			if !whole {
				return "", nil
			}
		}
		left := copy(buf, data)
		clear(buf[left:])
		held = left
		if held == len(buf) {
			skipping, held = true, 0
		}
	}
}
