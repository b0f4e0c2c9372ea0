// Plots draws what BenchmarkGrowth measured: it reads the output of go test
// -bench from its standard input and writes growth-cpu.svg and growth-bytes.svg
// into the directory named. It is a module of its own, so that the agent's does
// not depend on a drawing library.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"image/color"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go test -bench Growth ... | plots DIR")
		os.Exit(2)
	}
	if err := run(os.Stdin, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "plots:", err)
		os.Exit(1)
	}
}

// line is one curve: what there is more and more of, and what each size cost by
// unit ("cpu-ms/op", "B/op").
type line struct {
	of     string
	points []point
}

type point struct {
	n    float64
	cost map[string]float64
}

func run(in io.Reader, dir string) error {
	lines, err := parse(in)
	if err != nil {
		return err
	}
	if len(lines) == 0 {
		return errors.New("no line of BenchmarkGrowth on the standard input")
	}
	for _, p := range []struct {
		file, unit, label string
		scale             float64
	}{
		{"growth-cpu.svg", "cpu-ms/op", "processor time of a pass, ms", 1},
		{"growth-bytes.svg", "B/op", "allocated in a pass, MB", 1e-6},
	} {
		if err := draws(lines, p.unit, p.label, p.scale, filepath.Join(dir, p.file)); err != nil {
			return err
		}
	}
	return nil
}

// parse reads lines such as
// "BenchmarkGrowth/disks/1000-2  3  268 ns/op  22.2 cpu-ms/op  120 B/op".
func parse(in io.Reader) ([]line, error) {
	var lines []line
	scanner := bufio.NewScanner(in)
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		if len(fields) < 4 {
			continue
		}
		name, ok := strings.CutPrefix(fields[0], "BenchmarkGrowth/")
		if !ok {
			continue
		}
		of, size, ok := strings.Cut(name, "/")
		size, _, _ = strings.Cut(size, "-")
		n, err := strconv.ParseFloat(size, 64)
		if !ok || err != nil {
			return nil, fmt.Errorf("%q is no size", fields[0])
		}
		p := point{n: n, cost: map[string]float64{}}
		for i := 2; i+1 < len(fields); i += 2 {
			if p.cost[fields[i+1]], err = strconv.ParseFloat(fields[i], 64); err != nil {
				return nil, fmt.Errorf("%q: %w", scanner.Text(), err)
			}
		}
		if len(lines) == 0 || lines[len(lines)-1].of != of {
			lines = append(lines, line{of: of})
		}
		l := &lines[len(lines)-1]
		l.points = append(l.points, p)
	}
	return lines, scanner.Err()
}

// draws draws one unit of all curves, both axes logarithmic: what grows as fast
// as the host is a straight line.
func draws(lines []line, unit, label string, scale float64, file string) error {
	p := plot.New()
	p.BackgroundColor = color.White
	p.X.Label.Text, p.Y.Label.Text = "processes, mounts, disks, paths", label
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker, p.Y.Tick.Marker = plot.LogTicks{Prec: -1}, plot.LogTicks{Prec: -1}
	p.Legend.Top, p.Legend.Left = true, true
	p.Add(plotter.NewGrid())
	colors := []color.Color{
		color.RGBA{0x1f, 0x77, 0xb4, 0xff}, color.RGBA{0xff, 0x7f, 0x0e, 0xff},
		color.RGBA{0x2c, 0xa0, 0x2c, 0xff}, color.RGBA{0xd6, 0x27, 0x28, 0xff},
	}
	shapes := []draw.GlyphDrawer{draw.CircleGlyph{}, draw.SquareGlyph{}, draw.TriangleGlyph{}, draw.CrossGlyph{}}
	for i, l := range lines {
		var xys plotter.XYs
		for _, at := range l.points {
			cost, ok := at.cost[unit]
			if !ok {
				return fmt.Errorf("%s of %.0f has no %s", l.of, at.n, unit)
			}
			xys = append(xys, plotter.XY{X: at.n, Y: cost * scale})
		}
		curve, marks, err := plotter.NewLinePoints(xys)
		if err != nil {
			return err
		}
		curve.Color, curve.Width = colors[i%len(colors)], vg.Points(1.5)
		marks.Color, marks.Shape, marks.Radius = colors[i%len(colors)], shapes[i%len(shapes)], vg.Points(3)
		p.Add(curve, marks)
		p.Legend.Add(l.of, curve, marks)
	}
	return p.Save(16*vg.Centimeter, 10*vg.Centimeter, file)
}
