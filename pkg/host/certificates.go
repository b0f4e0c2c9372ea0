package host

import (
	"bytes"
	"encoding/base64"
	"errors"

	"golang.org/x/sys/unix"
)

// maxCertificate is more than one certificate takes in DER, and
// maxCertificates more than a chain has.
const (
	maxCertificate  = 64 << 10
	maxCertificates = 32
)

// readCertificates reads the certificates of a PEM file (RFC 7468). The kubelet
// keeps its private key in the same file, so the file is never read whole: one
// line at a time is looked at in a small buffer, which is wiped afterwards, and
// only lines of certificates are kept.
func (r *Root) readCertificates(name string) ([][]byte, error) {
	fd, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, ErrNotRegular
	}
	return scanCertificates(func(p []byte) (int, error) { return unix.Read(fd, p) })
}

// errPEM does not quote the file.
var errPEM = errors.New("a certificate in it is cut off or not in base64")

// scanCertificates returns the DER of each "CERTIFICATE" block. Lines of RFC 7468
// have 64 characters; one that is longer than the buffer belongs to no block.
func scanCertificates(read func([]byte) (int, error)) ([][]byte, error) {
	buf := make([]byte, 512)
	defer clear(buf)
	var found [][]byte
	var body []byte
	within, held, size := false, 0, 0
	for {
		n, err := read(buf[held:])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		}
		n = max(n, 0)
		if size += n; size > MaxFile {
			return nil, ErrTooLarge
		}
		held += n
		data := buf[:held]
		for len(data) > 0 {
			line, rest, whole := bytes.Cut(data, []byte("\n"))
			if !whole && n != 0 {
				break
			}
			data = rest
			switch line = bytes.TrimSpace(line); {
			case string(line) == "-----BEGIN CERTIFICATE-----":
				within, body = true, nil
			case string(line) == "-----END CERTIFICATE-----" && within:
				der, err := base64.StdEncoding.AppendDecode(nil, body)
				if err != nil || len(der) == 0 {
					return nil, errPEM
				}
				if found = append(found, der); len(found) > maxCertificates {
					return nil, ErrTooLarge
				}
				within = false
			case bytes.HasPrefix(line, []byte("-----")):
				if within {
					return nil, errPEM
				}
			case within:
				if body = append(body, line...); len(body) > maxCertificate {
					return nil, ErrTooLarge
				}
			}
		}
		if n == 0 {
			if within {
				return nil, errPEM
			}
			return found, nil
		}
		left := copy(buf, data)
		clear(buf[left:])
		if held = left; held == len(buf) {
			if within {
				return nil, errPEM
			}
			held = 0
		}
	}
}
