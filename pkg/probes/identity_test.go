package probes

import (
	"strings"
	"testing"
)

func TestParseIdentity(t *testing.T) {
	for text, want := range map[string]string{
		"4C4C4544-0044-4A10-8030-B8C04F4D3532\n": "4c4c4544-0044-4a10-8030-b8c04f4d3532",
		"  nqn.2014-08.org:a \nsecond line\n":    "nqn.2014-08.org:a",
		"":                                       "",
		"\n\n":                                   "",
		"00000000-0000-0000-0000-000000000000\n": "",
		"FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF\n": "",
		"03000200-0400-0500-0006-000700080009\n": "",
		"Not Settable\n":                         "",
		"uninitialized\n":                        "",
		"00000000000000000000000000000000\n":     "",
		"f0000000000000000000000000000000":       "f0000000000000000000000000000000",
	} {
		if got := parseIdentity([]byte(text)); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func FuzzParseIdentity(f *testing.F) {
	f.Add([]byte("4C4C4544-0044-4A10-8030-B8C04F4D3532\n"))
	f.Add([]byte("\x00\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got := parseIdentity(data)
		if strings.Contains(got, "\n") || strings.TrimSpace(got) != got {
			t.Errorf("%q from %q", got, data)
		}
	})
}
