package probes

import (
	"cmp"
	"strings"
)

// kernelFlavour is what two releases of the same line of kernels have in common:
// "cloud-amd64" of Debian, "generic" of Ubuntu, "default" of SUSE behind the
// version, "el.x86_64", "fc.x86_64+rt" of the distributions with rpm within it.
// It is "" where nothing but a version is left.
func kernelFlavour(release string) string {
	letter := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }
	// "-rc3" is part of the version.
	for i := 0; i+1 < len(release); i++ {
		if release[i] == '-' && letter(release[i+1]) && !strings.HasPrefix(release[i:], "-rc") {
			return release[i+1:]
		}
	}
	for i := 0; i+1 < len(release); i++ {
		if (release[i] == '.' || release[i] == '+') && letter(release[i+1]) {
			tag, rest, more := strings.Cut(release[i+1:], ".")
			// The release of the distribution, el9_4, changes with updates.
			tag = strings.Map(func(r rune) rune {
				if r >= '0' && r <= '9' || r == '_' {
					return -1
				}
				return r
			}, tag)
			if more {
				tag += "." + rest
			}
			return tag
		}
	}
	return ""
}

// compareKernels orders releases of one flavour as rpm does (rpm-version(7)) and
// as dpkg does where their versions differ in numbers only: numbers by value,
// words by letters, a number after a word, what is longer after what it begins
// with, and '~' and "-rc" before all.
func compareKernels(a, b string) int {
	a, b = strings.ReplaceAll(a, "-rc", "~rc"), strings.ReplaceAll(b, "-rc", "~rc")
	digit := func(c byte) bool { return c >= '0' && c <= '9' }
	alnum := func(c byte) bool { return digit(c) || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }
	for {
		for a != "" && !alnum(a[0]) && a[0] != '~' {
			a = a[1:]
		}
		for b != "" && !alnum(b[0]) && b[0] != '~' {
			b = b[1:]
		}
		tildeA, tildeB := strings.HasPrefix(a, "~"), strings.HasPrefix(b, "~")
		switch {
		case tildeA && tildeB:
			a, b = a[1:], b[1:]
			continue
		case tildeA:
			return -1
		case tildeB:
			return 1
		case a == "" || b == "":
			return cmp.Compare(len(a), len(b))
		case digit(a[0]) != digit(b[0]):
			if digit(a[0]) {
				return 1
			}
			return -1
		}
		number := digit(a[0])
		var x, y string
		x, a = cutRun(a, number, digit, alnum)
		y, b = cutRun(b, number, digit, alnum)
		if number {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if c := cmp.Compare(len(x), len(y)); c != 0 {
				return c
			}
		}
		if c := cmp.Compare(x, y); c != 0 {
			return c
		}
	}
}

// cutRun cuts off the digits, or the letters, that s begins with.
func cutRun(s string, number bool, digit, alnum func(byte) bool) (run, rest string) {
	i := 0
	for i < len(s) && alnum(s[i]) && digit(s[i]) == number {
		i++
	}
	return s[:i], s[i:]
}
