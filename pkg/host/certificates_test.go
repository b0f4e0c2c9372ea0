package host

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// inPieces reads text a few bytes at a time.
func inPieces(text string, size int) func([]byte) (int, error) {
	r := strings.NewReader(text)
	return func(p []byte) (int, error) {
		n, err := r.Read(p[:min(len(p), size)])
		if err == io.EOF {
			err = nil
		}
		return n, err
	}
}

func TestScanCertificates(t *testing.T) {
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	a, b := bytes.Repeat([]byte("a"), 1500), []byte("b")
	key := block("EC PRIVATE KEY", bytes.Repeat([]byte("secret"), 200))
	for name, tc := range map[string]struct {
		text string
		want [][]byte
		err  error
	}{
		"chain and key":        {block("CERTIFICATE", a) + block("CERTIFICATE", b) + key, [][]byte{a, b}, nil},
		"key first":            {key + block("CERTIFICATE", b), [][]byte{b}, nil},
		"words around":         {"subject=CN = x\r\n" + strings.ReplaceAll(block("CERTIFICATE", b), "\n", "\r\n"), [][]byte{b}, nil},
		"no newline at end":    {strings.TrimSuffix(block("CERTIFICATE", b), "\n"), [][]byte{b}, nil},
		"a line without end":   {strings.Repeat("x", 5000) + "\n" + block("CERTIFICATE", b), [][]byte{b}, nil},
		"none":                 {key, nil, nil},
		"empty":                {"", nil, nil},
		"cut off":              {block("CERTIFICATE", a)[:700], nil, errPEM},
		"not base64":           {"-----BEGIN CERTIFICATE-----\n????\n-----END CERTIFICATE-----\n", nil, errPEM},
		"key inside":           {"-----BEGIN CERTIFICATE-----\n" + key, nil, errPEM},
		"a long line in one":   {"-----BEGIN CERTIFICATE-----\n" + strings.Repeat("QUFB", 500), nil, errPEM},
		"without end":          {strings.Repeat(block("CERTIFICATE", b), 100), nil, ErrTooLarge},
		"larger than any file": {strings.Repeat("x\n", MaxFile/2+1), nil, ErrTooLarge},
	} {
		for _, size := range []int{1, 100, 512} {
			if len(tc.text) > 1<<20 && size == 1 {
				continue
			}
			got, err := scanCertificates(inPieces(tc.text, size))
			if !errors.Is(err, tc.err) || len(got) != len(tc.want) {
				t.Errorf("%s in pieces of %d: %d certificates, %v; want %d, %v", name, size, len(got), err, len(tc.want), tc.err)
				continue
			}
			for i := range got {
				if !bytes.Equal(got[i], tc.want[i]) {
					t.Errorf("%s: certificate %d is another", name, i)
				}
			}
		}
	}
}

// What is in the buffer when the last line has been looked at is wiped, so that
// no part of a key stays behind.
func TestScanCertificatesWipes(t *testing.T) {
	var buf []byte
	r := inPieces("-----BEGIN PRIVATE KEY-----\nc2VjcmV0c2VjcmV0\n-----END PRIVATE KEY-----\n", 512)
	if _, err := scanCertificates(func(p []byte) (int, error) {
		buf = p[:cap(p)]
		return r(p)
	}); err != nil {
		t.Fatal(err)
	}
	if len(buf) == 0 || bytes.Trim(buf, "\x00") != nil {
		t.Errorf("%d bytes, in which %q was left", len(buf), bytes.Trim(buf, "\x00"))
	}
}

func TestCertificatesOfATree(t *testing.T) {
	dir := t.TempDir()
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("der")})
	if err := os.WriteFile(filepath.Join(dir, "x.pem"), cert, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := r.Certificates(context.Background(), "/x.pem"); err != nil || len(got) != 1 || string(got[0]) != "der" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := r.Certificates(context.Background(), "/fifo"); !errors.Is(err, ErrNotRegular) {
		t.Errorf("a FIFO: %v", err)
	}
	if _, err := r.Certificates(context.Background(), "/none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func FuzzScanCertificates(f *testing.F) {
	f.Add("-----BEGIN CERTIFICATE-----\nZGVy\n-----END CERTIFICATE-----\n", 3)
	f.Add("-----BEGIN PRIVATE KEY-----\nZGVy\n-----END PRIVATE KEY-----\n-----BEGIN CERTIFICATE-----\nZGVy\n-----END CERTIFICATE-----", 512)
	f.Add("-----BEGIN CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\n", 20)
	f.Fuzz(func(t *testing.T, text string, size int) {
		if size < 1 || size > 600 {
			return
		}
		whole, err := scanCertificates(inPieces(text, 512))
		pieces, err2 := scanCertificates(inPieces(text, size))
		if (err == nil) != (err2 == nil) || len(whole) != len(pieces) {
			t.Errorf("%d certificates, %v; in pieces of %d %d, %v", len(whole), err, size, len(pieces), err2)
		}
	})
}
