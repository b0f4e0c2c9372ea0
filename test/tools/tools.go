// Package tools only anchors this module: what it builds stands in the tool
// lines of its go.mod.
package tools
