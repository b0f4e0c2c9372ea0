package probes

import (
	_ "embed"
	"strconv"
	"strings"
)

// kubeletVersions says in which minor version flags and feature gates of the
// kubelet were deprecated, locked and removed; its head names the sources. It is
// looked up where it lies: few nodes have a flag or gate that is in it.
//
//go:embed kubelet_versions.tsv
var kubeletVersions string

// kubeletFlag is what became of a flag; minors are N of 1.N, 0 for not (yet).
type kubeletFlag struct {
	deprecated, removed int
	// says is what the kubelet itself says about it.
	says string
}

// kubeletGate is what became of a feature gate. A locked one refuses any other
// value than lockedTo.
type kubeletGate struct {
	locked, removed int
	lockedTo        bool
}

// kubeletRow finds the fields behind the name in a row of the table.
func kubeletRow(kind, name string) []string {
	if name == "" || strings.ContainsAny(name, "\t\n") {
		return nil
	}
	_, rest, ok := strings.Cut(kubeletVersions, "\n"+kind+"\t"+name+"\t")
	if !ok {
		return nil
	}
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Split(line, "\t")
}

func flagHistory(name string) (kubeletFlag, bool) {
	row := kubeletRow("flag", name)
	if len(row) < 3 {
		return kubeletFlag{}, false
	}
	return kubeletFlag{tableMinor(row[0]), tableMinor(row[1]), row[2]}, true
}

func gateHistory(name string) (kubeletGate, bool) {
	row := kubeletRow("gate", name)
	if len(row) < 3 {
		return kubeletGate{}, false
	}
	return kubeletGate{locked: tableMinor(row[0]), lockedTo: row[1] == "true", removed: tableMinor(row[2])}, true
}

// newestKubelet is the last minor version the table knows.
func newestKubelet() int {
	if row := kubeletRow("known", "14"); len(row) == 1 {
		return tableMinor(row[0])
	}
	return 0
}

// tableMinor reads "24", "<=14" and "-".
func tableMinor(field string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(field, "<="))
	return n
}

// minorVersion is N of a version such as "v1.N.3+k3s1"; 0 for what is none.
func minorVersion(version string) int {
	rest, ok := strings.CutPrefix(strings.TrimPrefix(version, "v"), "1.")
	if !ok {
		return 0
	}
	digits := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = rest[:i]
	}
	n, err := strconv.Atoi(digits)
	if err != nil || n > 10000 {
		return 0
	}
	return n
}
